"""Teachers and rollouts with the real vLLM and the real llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support import language_worlds as worlds
from support import real_servers as real
from support.language_methods import causal, model, ready
from support.real_servers import ServerProcess
from tutelage.errors import CapabilityError, EndpointError
from tutelage.students import add_lora
from tutelage.taps import Needs, observe
from tutelage.teachers import RemoteTeacher

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROWS = [row["messages"] for row in worlds.conversations(3)]
TEXTS = [worlds.texts(3)[0], *ROWS[:2]]
K = 12
GREEDY: dict[str, Any] = {"sampling_temperature": 0.0, "max_new_tokens": 8}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, cutter: Any) -> Path:
    """Of models; ``untied`` has generation settings that change the distribution."""
    root = tmp_path_factory.mktemp("models")
    for tied, name in ((False, "untied"), (True, "tied")):
        real.llama_folder(root / name, cutter, tied=tied)
        real.llama_folder(root / f"other-{name}", cutter, tied=tied, seed=5)
    real.llama_folder(root / "deeper", cutter, layers=3)
    real.llama_folder(root / "wider", cutter, hidden=256)
    real.write_gguf(model(root / "untied"), cutter, root / "untied.gguf")
    settings = '{"do_sample": true, "top_k": 3, "repetition_penalty": 1.5, "eos_token_id": 5}'
    (root / "untied" / "generation_config.json").write_text(settings)
    return root


Start = Callable[[str], ServerProcess]


@pytest.fixture(scope="module")
def start(folders: Path) -> Iterator[Start]:
    """Start a server by its name; it is started once and ends with the module."""
    processes: dict[str, ServerProcess] = {}

    def start(name: str) -> ServerProcess:
        if name not in processes:
            log = folders / f"{name}.log"
            if name == "llama.cpp":
                processes[name] = real.start_llama_cpp(folders / "untied.gguf", log)
            elif name == "raw_logits":
                options = ["--logprobs-mode", "raw_logits"]
                processes[name] = real.start_vllm(folders / "untied", log, *options, development=False)
            else:
                processes[name] = real.start_vllm(folders / name, log)
        return processes[name].wait()

    try:
        yield start
    finally:
        for process in processes.values():
            process.stop()


def connect(server: ServerProcess, cutter: Any, kind: str = "vllm", **options: Any) -> RemoteTeacher:
    url = options.pop("url", server.root if kind == "llama.cpp" else server.url)
    given = {"k": K, "classes": len(cutter), "tokenizer": cutter, "longest": 64, "max_retry_time": 20.0, **options}
    return RemoteTeacher(url, server=kind, **given)


def rollouts(server: ServerProcess, **options: Any) -> dict[str, Any]:
    return {"url": server.url, "every": 1, "max_retry_time": 20.0, **options}


def moved(student: Any, by: float) -> Any:
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    return student


def assert_same(first: Any, second: Any) -> None:
    assert torch.equal(first.inputs["input_ids"], second.inputs["input_ids"])
    assert torch.equal(first.counted(), second.counted())


# Values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(("name", "kind"), [("llama.cpp", "llama.cpp"), ("untied", "vllm"), ("tied", "vllm")])
def test_log_probabilities_are_those_of_transformers(
    name: str, kind: str, pack: bool, start: Start, folders: Path, cutter: Any
) -> None:
    _, batch = causal(cutter, TEXTS, max_length=128, pack=pack)
    with connect(start(name), cutter, kind) as live:
        sparse = live.signal(batch, Needs(logits=False, head=True, temperature=1.0)).sparse
    assert sparse is not None
    own = model(folders / ("untied" if name == "llama.cpp" else name))
    with torch.no_grad():
        logits = observe(own, batch.inputs, Needs()).logits
    assert logits is not None
    log, at = logits.log_softmax(-1), batch.mask
    for right in (log.gather(-1, sparse.index), log.topk(K).values):
        torch.testing.assert_close(sparse.values[at], right[at], atol=1e-3, rtol=0.0)


# Refusals of a teacher -----------------------------------------------------------------------------------


def test_a_teacher_of_another_kind_is_refused(start: Start, cutter: Any) -> None:
    llama_cpp, vllm = start("llama.cpp"), start("untied")
    for server, kind, url, message in [
        (llama_cpp, "vllm", llama_cpp.url, r"(?s)a llama.cpp server, and the kind is vllm.*set kind: llama.cpp"),
        (llama_cpp, "vllm", llama_cpp.root, "a llama.cpp server, and the kind is vllm"),
        (vllm, "llama.cpp", vllm.url, r"(?s)a vLLM server, and the kind is llama.cpp.*set kind: vllm"),
        (vllm, "vllm", vllm.root, rf"(?s)teacher.endpoint.url.*set it to {vllm.url}"),
    ]:
        with pytest.raises(EndpointError, match=message):
            connect(server, cutter, kind, url=url)


def test_texts_beyond_the_context_are_refused(start: Start, cutter: Any) -> None:
    for name, kind, size in [("untied", "vllm", real.CONTEXT), ("llama.cpp", "llama.cpp", real.LLAMA_CPP_CONTEXT)]:
        with pytest.raises(CapabilityError, match=rf"(?s)context has {size} tokens.*{size - 1} at most"):
            connect(start(name), cutter, kind, longest=size)


def test_more_tokens_than_vllm_returns_and_an_unknown_model_are_refused(start: Start, cutter: Any) -> None:
    with pytest.raises(EndpointError, match=r"(?s)20.*--max-logprobs"):
        connect(start("untied"), cutter, k=21)
    with pytest.raises(EndpointError, match="it serves: tiny"):
        connect(start("untied"), cutter, model="big")


def test_another_tokenizer_is_refused(start: Start, cutter: Any) -> None:
    other = worlds.tokenizer(merges=10)
    for name, kind in [("untied", "vllm"), ("llama.cpp", "llama.cpp")]:
        with pytest.raises(CapabilityError, match="the same tokenizer"):
            connect(start(name), other, kind, classes=len(cutter))


def test_raw_logits_are_refused(start: Start, cutter: Any) -> None:
    with pytest.raises(EndpointError, match="form no distribution: start vLLM with --logprobs-mode raw_logprobs"):
        connect(start("raw_logits"), cutter)


# Rollouts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_vllm_answers_with_the_students_weights_after_each_hand_over(
    name: str, start: Start, folders: Path, cutter: Any
) -> None:
    _, batch = causal(cutter, ROWS, max_length=64)
    student, teacher = model(folders / f"other-{name}"), model(folders / name)
    own = ready(student, teacher, batch, **GREEDY)
    method = ready(student, teacher, batch, rollouts=rollouts(start(name)), **GREEDY)
    first = own.prepare_batch(student, batch)
    assert_same(method.prepare_batch(student, batch), first)
    moved(student, 0.05)
    method.after_step()
    second = own.prepare_batch(student, batch)
    assert_same(method.prepare_batch(student, batch), second)
    assert not torch.equal(first.inputs["input_ids"], second.inputs["input_ids"])  # type: ignore[index, call-overload]


def test_vllm_gets_adapters_as_a_part_of_the_model(start: Start, folders: Path, cutter: Any) -> None:
    _, batch = causal(cutter, ROWS, max_length=64)
    student, teacher = moved(add_lora(model(folders / "other-tied"), rank=4), 0.02), model(folders / "tied")
    own = ready(student, teacher, batch, **GREEDY)
    method = ready(student, teacher, batch, rollouts=rollouts(start("tied")), **GREEDY)
    assert_same(method.prepare_batch(student, batch), own.prepare_batch(student, batch))


def test_vllm_draws_from_the_softmax_whatever_its_generation_config(start: Start, folders: Path, cutter: Any) -> None:
    """The folder that vLLM serves sets top_k 3 and a repetition penalty."""
    draws, temperature = 2000, 0.5
    _, batch = causal(cutter, ROWS, max_length=64)
    student = model(folders / "other-untied")
    method = ready(
        student, student, batch, sampling_temperature=temperature, rollouts=rollouts(start("untied"))
    )  # fmt: skip
    method.prepare_batch(student, batch)
    prompt = torch.tensor(cutter("Ann has 3 apples")["input_ids"])
    assert method.rollouts is not None
    answers = method.rollouts.sample_completions(
        student, [prompt] * draws, max_new_tokens=1, temperature=temperature
    )  # fmt: skip
    tokens = torch.tensor([int(answer.ids[-1]) for answer in answers])
    with torch.no_grad():
        right = (student(input_ids=prompt[None]).logits[0, -1] / temperature).softmax(-1)
    best = right.topk(15).indices
    for expected, count in [
        *((right[token], (tokens == token).sum()) for token in best),
        (1 - right[best].sum(), (~torch.isin(tokens, best)).sum()),
    ]:
        deviation = float((expected * (1 - expected) / draws).sqrt())
        assert abs(float(count) / draws - float(expected)) < 5 * deviation + 1 / draws
    assert 0.1 < float(right[best].sum()) < 0.95


def test_an_output_head_that_vllm_keeps_is_seen(
    start: Start, folders: Path, cutter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM 0.32 for CPUs keeps a packed copy of a tied head, unless the head has weights of its own in the file."""
    from tutelage.methods import rollouts as module

    _, batch = causal(cutter, ROWS, max_length=64)
    student, teacher, write = model(folders / "other-tied"), model(folders / "tied"), module.write_plain_model
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_plain_model", lambda *a, untie, **o: write(*a, untie=False, **o))
        method = ready(student, teacher, batch, rollouts=rollouts(start("tied")), **GREEDY)
        with pytest.raises(EndpointError, match="does not use the weights that it has loaded"):
            method.prepare_batch(student, batch)
    own = ready(student, teacher, batch, **GREEDY)
    method = ready(student, teacher, batch, rollouts=rollouts(start("tied")), **GREEDY)
    assert_same(method.prepare_batch(student, batch), own.prepare_batch(student, batch))


@pytest.mark.parametrize(
    ("name", "message"),
    [("deeper", "another shape: layers 2, and the student has 3"),
     ("wider", "another shape: hidden size 128, and the student has 256")],
)  # fmt: skip
def test_a_student_of_another_shape_is_refused_and_vllm_lives(
    name: str, message: str, start: Start, folders: Path, cutter: Any
) -> None:
    _, batch = causal(cutter, ROWS, max_length=64)
    student = model(folders / name)
    with pytest.raises(EndpointError, match=message):
        ready(student, student, batch, rollouts=rollouts(start("untied")), **GREEDY).prepare_batch(student, batch)
    student = model(folders / "other-untied")
    method = ready(student, student, batch, rollouts=rollouts(start("untied")), **GREEDY)
    assert_same(
        method.prepare_batch(student, batch), ready(student, student, batch, **GREEDY).prepare_batch(student, batch)
    )


def test_an_answer_that_does_not_fit_the_context_is_refused(start: Start, folders: Path, cutter: Any) -> None:
    _, batch = causal(cutter, ROWS, max_length=64)
    student = model(folders / "other-untied")
    student.tokenizer = cutter
    for name, size, options in [
        ("untied", real.CONTEXT, {}),
        ("untied", real.CONTEXT, {"kind": "openai", "every": None, "model": "tiny"}),
        ("llama.cpp", real.LLAMA_CPP_CONTEXT, {"kind": "openai", "every": None, "model": "tiny"}),
    ]:
        method = ready(student, student, batch, rollouts=rollouts(start(name), **options), max_new_tokens=size - 4)
        with pytest.raises(CapabilityError, match=rf"(?s)context has {size} tokens; the longest prompt has.*at most"):
            method.prepare_batch(student, batch)


def test_rollouts_name_a_server_or_a_url_that_is_not_vllms(start: Start, folders: Path, cutter: Any) -> None:
    _, batch = causal(cutter, ROWS, max_length=64)
    student = model(folders / "other-untied")
    student.tokenizer = cutter
    llama_cpp, vllm = start("llama.cpp"), start("untied")
    for given, message in [
        (rollouts(llama_cpp), "a llama.cpp server, and the kind is vllm"),
        (rollouts(llama_cpp, kind="openai"), "a llama.cpp server loads no weights"),
        (rollouts(vllm, url=vllm.root), rf"(?s)method.rollouts.url.*set it to {vllm.url}"),
        (rollouts(vllm, model="big"), "it serves: tiny"),
        (rollouts(vllm, kind="openai"), r"(?s)vLLM server loads no model by the path.*set kind: vllm"),
        (
            rollouts(llama_cpp, url=llama_cpp.root, kind="openai", every=None, model="tiny"),
            rf"set it to {llama_cpp.url}",
        ),
        (rollouts(start("raw_logits")), r"(?s)cannot load the student's weights.*VLLM_SERVER_DEV_MODE=1"),
    ]:
        with pytest.raises(EndpointError, match=message):
            ready(student, student, batch, rollouts=given, **GREEDY).prepare_batch(student, batch)


@pytest.mark.parametrize("name", ["untied", "llama.cpp"])
def test_a_server_without_hand_over_answers_as_text(name: str, start: Start, folders: Path, cutter: Any) -> None:
    _, batch = causal(cutter, ROWS, max_length=64)
    student = model(folders / "other-untied")
    student.tokenizer = cutter
    options = {"kind": "openai", "every": None, "model": "tiny"}
    method = ready(student, student, batch, rollouts=rollouts(start(name), **options), **GREEDY)
    answers = method.prepare_batch(student, batch)
    assert bool((answers.counted().sum(1) > 0).all())


def test_vllm_that_was_killed_and_started_again_gets_the_weights_again(
    start: Start, folders: Path, cutter: Any
) -> None:
    _, batch = causal(cutter, ROWS, max_length=64)
    student, server = model(folders / "other-untied"), start("untied")
    first = ready(student, student, batch, **GREEDY).prepare_batch(student, batch)
    given = rollouts(server, every=10, max_retry_time=400.0)
    method = ready(student, student, batch, rollouts=given, **GREEDY)
    assert_same(method.prepare_batch(student, batch), first)
    server.kill()
    server.start()  # the client retries until it is ready
    assert_same(method.prepare_batch(student, batch), first)
