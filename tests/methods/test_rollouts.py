"""Students whose answers a server writes, which is given their weights."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tutelage
from support import language_worlds as worlds
from support import served_worlds as servers
from support.language_methods import causal, model, ready, recipe
from support.transformers_server import served
from tutelage import servers as asking
from tutelage.config import build_recipe
from tutelage.data import Batch
from tutelage.errors import CapabilityError, ConfigError, EndpointError
from tutelage.methods import OnPolicyMethod
from tutelage.students import add_lora
from tutelage.students.hand_over import prompt_text

__all__ = ["recipe"]

ROWS = [row["messages"] for row in worlds.conversations(6)]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "FIRST_WAIT", 0.005)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(folder: Path, cutter: Any) -> Iterator[servers.Server]:
    """Of the students' shape, and of other weights than any student's."""
    with servers.serving(of_other_weights(folder), cutter) as found:
        yield found


def of_other_weights(folder: Path, layers: int = 2) -> Any:
    other = model(folder, layers)
    moved(other, 0.5)
    return other


def drawn(server: servers.Server) -> list[Any]:
    """The requests for answers."""
    return [body for body in server.asked if "prompt_logprobs" not in body]


def of(server: servers.Server, **options: Any) -> dict[str, Any]:
    return {"url": f"{server.url}/v1", "every": 1, "max_retry_time": 20.0, **options}


def same(first: Batch, second: Batch) -> bool:
    assert isinstance(first.inputs, dict)
    assert isinstance(second.inputs, dict)
    return first.inputs["input_ids"].shape == second.inputs["input_ids"].shape and torch.equal(
        first.inputs["input_ids"], second.inputs["input_ids"]
    )


def moved(student: Any, by: float) -> None:
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))


def test_a_server_writes_what_the_student_would(server: servers.Server, cutter: Any, folder: Path) -> None:
    _, batch = causal(cutter, ROWS, max_length=256)
    student, teacher = model(folder, 2), model(folder)
    moved(student, 0.3)  # else it repeats itself
    student.generation_config.eos_token_id = list(range(0, len(cutter), 9))  # ends at different places
    own = ready(student, teacher, batch, sampling_temperature=0.0, max_new_tokens=12)
    asked = ready(student, teacher, batch, sampling_temperature=0.0, max_new_tokens=12, rollouts=of(server))
    mine, theirs = own.prepare_batch(student, batch), asked.prepare_batch(student, batch)
    assert same(mine, theirs)
    assert torch.equal(mine.counted(), theirs.counted())
    assert len(set(theirs.counted().sum(1).tolist())) > 1
    assert all(isinstance(token, int) for body in drawn(server) for token in body["prompt"])
    assert student.training is False
    assert server.url in asked.formula()


def test_it_writes_as_the_student_was_at_most_so_many_steps_ago(
    server: servers.Server, cutter: Any, folder: Path
) -> None:
    _, batch = causal(cutter, ROWS, max_length=256)
    student, teacher = model(folder, 2), model(folder)
    own = ready(student, teacher, batch, sampling_temperature=0.0, max_new_tokens=8)
    method = ready(student, teacher, batch, sampling_temperature=0.0, max_new_tokens=8, rollouts=of(server, every=2))
    first = own.prepare_batch(student, batch)
    assert same(method.prepare_batch(student, batch), first)
    moved(student, 0.3)
    method.after_step()
    assert same(method.prepare_batch(student, batch), first)
    method.after_step()
    changed = method.prepare_batch(student, batch)
    assert same(changed, own.prepare_batch(student, batch))
    assert not same(changed, first)
    places = [Path(body["kwargs"]["weights_path"]) for path, body in server.told if path == "/collective_rpc"]
    assert [place.name for place in places] == [
        "step-changed", "step-000000000", "step-000000002",
    ]  # fmt: skip
    assert [path for path, _ in server.told] == ["/collective_rpc", "/reset_prefix_cache"] * 3
    assert not places[0].exists()
    assert not places[1].exists()
    assert places[2].exists()
    assert places[2].parent.stat().st_mode & 0o777 == 0o755  # the server may be somebody else's
    del method
    assert not places[2].parent.exists()


def test_adapters_are_handed_over_as_part_of_a_plain_model(server: servers.Server, cutter: Any, folder: Path) -> None:
    _, batch = causal(cutter, ROWS, max_length=256)
    teacher = model(folder)
    student = add_lora(model(folder, 2), rank=4)
    moved(student, 0.1)
    own = ready(student, teacher, batch, sampling_temperature=0.0, max_new_tokens=8)
    method = ready(student, teacher, batch, sampling_temperature=0.0, max_new_tokens=8, rollouts=of(server))
    assert same(method.prepare_batch(student, batch), own.prepare_batch(student, batch))
    assert not any("lora" in name for name, _ in server.model.named_parameters())
    assert any("lora" in name for name, _ in student.named_parameters())


def test_a_server_draws_from_the_softmax_whatever_the_models_own_settings(
    server: servers.Server, cutter: Any, folder: Path
) -> None:
    _, batch = causal(cutter, ROWS[:2], max_length=256)
    student = model(folder, 2)
    student.generation_config.top_k, student.generation_config.do_sample = 3, True
    method = ready(student, model(folder), batch, sampling_temperature=0.7, rollouts=of(server))
    method.prepare_batch(student, batch)
    assert {body["temperature"] for body in drawn(server)} == {0.7}
    (*_, kept_in) = [body["kwargs"] for path, body in server.told if path == "/collective_rpc"]
    kept = json.loads((Path(kept_in["weights_path"]) / "generation_config.json").read_text())
    assert (kept["do_sample"], kept["top_k"], kept["temperature"]) == (True, 0, 0.7)
    assert student.generation_config.top_k == 3


def test_a_server_without_the_students_weights_writes_as_it_is(
    server: servers.Server, cutter: Any, folder: Path
) -> None:
    _, batch = causal(cutter, ROWS, max_length=256)
    student, teacher = model(folder, 2), model(folder)
    method = ready(
        student, teacher, batch, sampling_temperature=0.0, max_new_tokens=8, rollouts=of(server, every=None)
    )
    its = ready(server.model, teacher, batch, sampling_temperature=0.0, max_new_tokens=8)
    assert same(method.prepare_batch(student, batch), its.prepare_batch(server.model, batch))
    assert not server.told


def unfinished(_: servers.Handler, answer: Any) -> Any:
    answer["choices"][0]["finish_reason"] = "abort"
    return answer


def without_choices(_: servers.Handler, answer: Any) -> Any:
    return {**answer, "choices": []}


def without_tokens(_: servers.Handler, answer: Any) -> Any:
    del answer["choices"][0]["token_ids"]
    return answer


@pytest.mark.parametrize(
    "fault", [unfinished, without_choices, servers.breaks, servers.overloaded], ids=lambda f: f.__name__
)
def test_a_fault_that_passes_changes_nothing(fault: Any, server: servers.Server, cutter: Any, folder: Path) -> None:
    _, batch = causal(cutter, ROWS, max_length=256)
    student, teacher = model(folder, 2), model(folder)
    method = ready(student, teacher, batch, sampling_temperature=0.0, rollouts=of(server))
    own = ready(student, teacher, batch, sampling_temperature=0.0)
    method.prepare_batch(student, batch)
    server.asked.clear()
    server.faults[:] = [None, fault, None, fault]
    assert same(method.prepare_batch(student, batch), own.prepare_batch(student, batch))
    assert len(drawn(server)) == len(ROWS) + 2


@pytest.mark.parametrize(
    ("fault", "said"),
    [(unfinished, "stops an answer early"), (without_tokens, "no token ids"), (servers.breaks, "out of memory")],
    ids=["unfinished", "without_tokens", "breaks"],
)
def test_a_fault_that_stays_is_an_error(
    fault: Any, said: str, server: servers.Server, cutter: Any, folder: Path
) -> None:
    _, batch = causal(cutter, ROWS[:1], max_length=256)
    student, teacher = model(folder, 2), model(folder)
    method = ready(student, teacher, batch, rollouts=of(server, max_retry_time=0.2))
    method.prepare_batch(student, batch)
    server.faults[:] = [fault] * 300
    with pytest.raises(EndpointError, match=said):
        method.prepare_batch(student, batch)


def test_a_server_that_takes_no_weights_is_an_error(server: servers.Server, cutter: Any, folder: Path) -> None:
    _, batch = causal(cutter, ROWS[:1], max_length=256)
    student, teacher = model(folder, 2), model(folder)
    server.takes = False
    method = ready(student, teacher, batch, rollouts=of(server))
    with pytest.raises(
        EndpointError, match=r"cannot load the student's weights: refuses the request \(404\)"
    ) as refused:
        method.prepare_batch(student, batch)
    assert "VLLM_SERVER_DEV_MODE=1" in str(refused.value)


def test_a_server_that_ignores_the_weights_is_refused(server: servers.Server, cutter: Any, folder: Path) -> None:
    _, batch = causal(cutter, ROWS[:1], max_length=256)
    server.ignores = True
    method = ready(model(folder, 2), model(folder), batch, rollouts=of(server))
    with pytest.raises(EndpointError, match="does not use the weights that it has loaded"):
        method.prepare_batch(model(folder, 2), batch)


@pytest.mark.parametrize("step", [0, 1])
def test_an_output_head_that_stays_is_seen(
    step: int, server: servers.Server, cutter: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a tied model on vLLM for CPUs, where the weights of the head are not written out."""
    from tutelage.methods import rollouts

    _, batch = causal(cutter, ROWS[:1], max_length=256)
    student = model(folder, 2)
    method = ready(student, model(folder), batch, rollouts=of(server))
    if step:
        method.prepare_batch(student, batch)
        moved(student, 0.01)
        method.after_step()
    write = rollouts.write_plain_model
    monkeypatch.setattr(rollouts, "write_plain_model", lambda *a, untie, **o: write(*a, untie=False, **o))
    with pytest.raises(EndpointError, match="does not use the weights that it has loaded"):
        method.prepare_batch(student, batch)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda folder, _: model(folder), "another shape: layers 4, and the student has 2"),
        (
            lambda _, path: model(worlds.llama(path, layers=2, hidden=64)),
            "another shape: hidden size 64, and the student has 32",
        ),
    ],
    ids=["deeper", "wider"],
)
def test_a_server_of_another_shape_is_refused_and_lives(
    made: Any, said: str, cutter: Any, folder: Path, tmp_path: Path
) -> None:
    _, batch = causal(cutter, ROWS[:1], max_length=256)
    student = model(folder, 2)
    with servers.serving(made(folder, tmp_path / "other"), cutter) as server:
        method = ready(student, model(folder), batch, rollouts=of(server))
        with pytest.raises(EndpointError, match=said):
            method.prepare_batch(student, batch)
        assert not server.is_dead


def test_a_server_that_was_restarted_gets_the_weights_again(
    server: servers.Server, cutter: Any, folder: Path
) -> None:
    _, batch = causal(cutter, ROWS, max_length=256)
    student = model(folder, 2)
    options: dict[str, Any] = {"sampling_temperature": 0.0, "max_new_tokens": 8}
    own = ready(student, model(folder), batch, **options)
    method = ready(student, model(folder), batch, rollouts=of(server, every=10), **options)
    first = own.prepare_batch(student, batch)
    assert same(method.prepare_batch(student, batch), first)
    server.restart()
    assert same(method.prepare_batch(student, batch), first)


def test_a_prompt_and_an_answer_that_do_not_fit_are_refused_before_anything_is_trained(
    recipe: dict[str, Any], cutter: Any, tmp_path: Path
) -> None:
    recipe["data"].pop("pack")
    teacher = Path(recipe["teacher"]["model"].removeprefix("hf:"))
    with servers.serving(of_other_weights(teacher), cutter, longest=100) as server:
        recipe["method"] = {"kind": "on-policy", "max_new_tokens": 90, "rollouts": of(server)}
        with pytest.raises(CapabilityError, match=r"(?s)context has 100 tokens; the longest prompt has \d+.*at most"):
            tutelage.run(build_recipe(recipe), out=tmp_path / "run")
        assert not server.told
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_answer_that_is_cut_is_an_error(server: servers.Server, cutter: Any, folder: Path) -> None:
    def cut(_: servers.Handler, answer: Any) -> Any:
        choice = answer["choices"][0]
        if choice.get("token_ids"):
            choice.update(token_ids=choice["token_ids"][:2], finish_reason="length")
        return answer

    _, batch = causal(cutter, ROWS[:1], max_length=256)
    student = model(folder, 2)
    method = ready(student, model(folder), batch, rollouts=of(server))
    method.prepare_batch(student, batch)
    server.faults[:] = [cut] * 20
    with pytest.raises(EndpointError, match="cuts an answer after 2 of 6 tokens"):
        method.prepare_batch(student, batch)


def test_a_llama_cpp_server_is_named(cutter: Any, folder: Path) -> None:
    _, batch = causal(cutter, ROWS[:1], max_length=256)
    student = model(folder, 2)
    student.tokenizer = cutter
    with servers.serving(model(folder, 2), cutter, kind="llama.cpp") as server:
        for kind, said in [("vllm", "a llama.cpp server, but the kind is vllm"), ("openai", "loads no weights")]:
            method = ready(student, model(folder), batch, rollouts=of(server, kind=kind))
            with pytest.raises(EndpointError, match=said):
                method.prepare_batch(student, batch)


def test_a_url_without_v1_and_a_vllm_server_of_kind_openai_are_named(
    server: servers.Server, cutter: Any, folder: Path
) -> None:
    _, batch = causal(cutter, ROWS[:1], max_length=256)
    student = model(folder, 2)
    student.tokenizer = cutter
    with servers.serving(model(folder, 2), cutter, kind="llama.cpp") as other:
        url = other.url
        for rollouts, message in [
            (
                of(other, url=url, kind="openai", every=None, model="tiny"),
                rf"(?s)does not end with.*set it to {url}/v1",
            ),
            (of(server, kind="openai"), r"(?s)vLLM server loads no model by the path.*set kind: vllm"),
        ]:
            method = ready(student, model(folder), batch, rollouts=rollouts)
            with pytest.raises(EndpointError, match=message):
                method.prepare_batch(student, batch)


def test_a_client_may_be_closed_by_its_own_thread() -> None:
    client = asking.JsonClient("http://127.0.0.1:1/v1", "method.rollouts")
    client.submit(client.close).result()


@pytest.mark.parametrize(
    ("setting", "value"),
    [("repetition_penalty", 1.5), ("presence_penalty", 0.5), ("frequency_penalty", 0.5), ("top_k", 2), ("top_p", 0.5),
     ("min_p", 0.3), ("eos_token_id", 5)],
)  # fmt: skip
def test_a_server_ignores_the_generation_settings_of_its_own_folder(
    setting: str, value: Any, server: servers.Server, cutter: Any, folder: Path
) -> None:
    setattr(server.model.generation_config, setting, value)
    _, batch = causal(cutter, ROWS[:2], max_length=256)
    student = model(folder, 2)
    method = ready(student, model(folder), batch, sampling_temperature=0.0, rollouts=of(server, every=None))
    plain = ready(student, model(folder), batch, sampling_temperature=0.0, rollouts=of(server, every=None))
    found = method.prepare_batch(student, batch)
    setattr(server.model.generation_config, setting, None)
    assert same(found, plain.prepare_batch(student, batch))


def test_what_does_not_go_together_is_refused(server: servers.Server, cutter: Any, folder: Path) -> None:
    rollouts = of(server)
    with pytest.raises(ConfigError, match="rollouts"):
        OnPolicyMethod(lmbda=1.0, divergence="reverse_kl", long=1.0, rollouts=rollouts)
    for odd in ({"model": "x", "every": 3}, {"every": None}):
        with pytest.raises(ConfigError, match="kind: openai"):
            OnPolicyMethod(lmbda=1.0, rollouts={"url": "http://127.0.0.1:1/v1", "kind": "openai", **odd})
    _, batch = causal(cutter, ROWS[:1], max_length=256)
    student = model(folder, 2)
    method = ready(student, model(folder), batch, rollouts=of(server, kind="openai", every=None, model="tiny"))
    with pytest.raises(CapabilityError, match="no tokenizer"):
        method.prepare_batch(student, batch)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"rollouts": {"url": "here"}}, "url"),
        ({"rollouts": {"url": "http://127.0.0.1:1/v1", "kind": "openai", "every": None}}, "name the model"),
        ({"rollouts": {"url": "http://127.0.0.1:1/v1"}, "divergence": "reverse_kl", "long": 1.0}, "itself"),
    ],
)
def test_a_recipe_says_what_does_not_go_together(method: dict[str, Any], said: str, recipe: dict[str, Any]) -> None:
    recipe["data"].pop("pack")
    recipe["method"] = {"kind": "on-policy", **method}
    with pytest.raises(ConfigError, match=said):
        build_recipe(recipe)


@pytest.fixture
def padded(recipe: dict[str, Any], cutter: Any) -> Iterator[servers.Server]:
    """Of the shape of the recipe's student."""
    with servers.serving(of_other_weights(Path(recipe["teacher"]["model"].removeprefix("hf:"))), cutter) as found:
        yield found


def test_a_recipe_is_written_for_by_a_server(padded: servers.Server, recipe: dict[str, Any], tmp_path: Path) -> None:
    server = padded
    recipe["data"].pop("pack")
    recipe["method"] = {
        "kind": "on-policy", "lmbda": 1.0, "max_new_tokens": 5,
        "rollouts": of(server, folder=str(tmp_path / "weights")),
    }  # fmt: skip
    tutelage.run(build_recipe(recipe), out=tmp_path / "run")
    assert server.asked
    places = [body["kwargs"]["weights_path"] for path, body in server.told if path == "/collective_rpc"]
    assert (
        len(set(places)) == recipe["train"]["steps"] + 3
    )  # before it changed and plain, to see whether it does; then changed
    assert all(place.startswith(str(tmp_path / "weights")) for place in places)


def test_a_server_that_is_not_there_is_missed_before_anything_is_trained(
    padded: servers.Server, recipe: dict[str, Any], tmp_path: Path
) -> None:
    server = padded
    recipe["data"].pop("pack")
    recipe["method"] = {"kind": "on-policy", "lmbda": 0.01, "rollouts": of(server, max_retry_time=0.2)}
    server.faults[:] = [servers.breaks] * 50
    with pytest.raises(EndpointError, match="out of memory"):
        tutelage.run(build_recipe(recipe), out=tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("template", list(worlds.TEMPLATES))
def test_text_is_read_as_the_tokens_that_are_meant(template: str) -> None:
    cutter = worlds.tokenizer(template)
    ids = cutter.apply_chat_template(ROWS[0][:1], add_generation_prompt=True)["input_ids"]
    assert cutter(prompt_text(cutter, ids))["input_ids"] == ids


def test_what_a_tokenizer_puts_before_each_text_is_not_said_twice() -> None:
    from tokenizers.processors import TemplateProcessing

    cutter = worlds.tokenizer()
    begin = cutter.convert_tokens_to_ids("<s>")
    cutter.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    ids = cutter("Ann has 3 apples")["input_ids"]
    assert ids[0] == begin
    assert prompt_text(cutter, ids) == "Ann has 3 apples"
    assert prompt_text(cutter, ids[1:]) == "Ann has 3 apples"  # the best that there is


def speaking_plainly(cutter: Any) -> Any:
    """A model that never writes what would be lost in text: parts of characters, and special tokens."""
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=len(cutter), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=cutter.eos_token_id, initializer_range=0.3,
    )  # fmt: skip
    student: Any = PhiForCausalLM(config).eval()
    for i in range(len(cutter)):
        if not cutter.decode([i]).isascii() or i in cutter.added_tokens_decoder:
            student.lm_head.bias.data[i] = -1e4
    student.tokenizer = cutter
    return student


@pytest.mark.skipif(
    importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None,
    reason="transformers serve needs transformers[serving]",
)
def test_a_real_server_writes_what_the_student_would(cutter: Any, folder: Path, tmp_path: Path) -> None:
    _, batch = causal(cutter, ROWS[:3], max_length=256)
    student, teacher = speaking_plainly(cutter), model(folder)
    own = ready(student, teacher, batch, sampling_temperature=0.0, max_new_tokens=8)
    with served(None, tmp_path) as url:
        method = ready(
            student, teacher, batch, sampling_temperature=0.0, max_new_tokens=8,
            rollouts={"url": url, "kind": "openai", "every": 1, "folder": str(tmp_path)},
        )  # fmt: skip
        for _ in range(2):
            mine, theirs = own.prepare_batch(student, batch), method.prepare_batch(student, batch)
            assert isinstance(mine.inputs, dict)
            assert isinstance(theirs.inputs, dict)
            for row in range(3):  # text that is cut anew may have other tokens, but the same characters
                said = [
                    cutter.decode(b.inputs["input_ids"][row][b.counted()[row].roll(1)])  # type: ignore[index, call-overload]
                    for b in (mine, theirs)
                ]
                assert said[0] == said[1]
                assert said[0].isascii()
            moved(student, 0.3)
            method.after_step()
