"""Compare this checkout with another commit: the same figures, the same weights, and the same speed.

    python benchmarks/compare_commits.py results COMMIT   # figures of summary.json and sha256 of exported weights
    python benchmarks/compare_commits.py speed COMMIT     # time of a step, interleaved: this checkout / the commit

``results`` runs each case on both commits with the same seeds: ``digits``, a small text classifier, a sentence
encoder, a causal language model of random weights with ``token`` and with ``on-policy``, and ``generate`` against a
    python benchmarks/compare_commits.py speed COMMIT     # time of a step: this checkout / the commit, interleaved
    python benchmarks/compare_commits.py commands COMMIT  # commands with their arguments and options
and so must the bytes of every saved model and of the generated data. Keys that were renamed since are mapped by
:data:`RENAMED`.

``speed`` runs both commits in turn, each time in a process of its own, and takes the ratio of medians. Use an idle
machine. Each writes ``results/compare-commits-*.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import http.server
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]

RENAMED = {
    "alone": "baseline",
    "taught": "uses_teacher",
}
"""Words of keys and names of models in ``summary.json``: before, now."""

RECIPE_KEYS = {
    "max_new": "max_new_tokens",
    "near": "dedup_threshold",
}
"""Keys of the recipes below: before, now."""

IGNORED = re.compile(r"latenc|seconds|_ms\b|time|throughput|per_second|memory|version|path|date|duration")
"""Keys of ``summary.json`` that are times, or name a folder."""

# Inputs ----------------------------------------------------------------------------------------------------------

TOPICS = {
    "sound": "music audio player codec mixer volume stereo song radio synth",
    "net": "server protocol packet router socket proxy firewall http dns mail",
    "math": "algebra matrix solver integral polynomial theorem prime vector calculus graph",
}
FILLER = "a the small fast library tool for with that provides and simple package"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a JSON-lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_inputs(folder: Path) -> None:
    """Write the tables and the teachers that the cases read."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    draw = random.Random(0)
    for name, count in (("train", 180), ("test", 90)):
        rows = []
        for i in range(count):
            label = list(TOPICS)[i % 3]
            words = [draw.choice((TOPICS[label] if draw.random() < 0.5 else FILLER).split()) for _ in range(8)]
            rows.append({"text": " ".join(words), "label": label})
        write_rows(folder / f"topics-{name}.jsonl", rows)
        chats = []
        for _ in range(count // 3):
            a, b = draw.randint(1, 9), draw.randint(1, 9)
            question, answer = f"What is {a} and {b}?", f"It is {a + b}."
            chats.append(
                {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            )
        write_rows(folder / f"chats-{name}.jsonl", chats)
    write_rows(folder / "prompts.jsonl", [{"prompt": f"Tell me about number {i} and {i * 7}"} for i in range(40)])

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({word for text in (*TOPICS.values(), FILLER) for word in text.split()})
    pieces = Tokenizer(models.WordPiece({w: i for i, w in enumerate([*special, *words])}, unk_token="[UNK]"))
    pieces.normalizer, pieces.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    pieces.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    torch.manual_seed(0)
    bert = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(bert).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")

    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer, pairs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False,
    )  # fmt: skip
    pairs.train_from_iterator(["What is 3 and 4? It is 7."] * 20, trainer)
    chat = transformers.PreTrainedTokenizerFast(
        tokenizer_object=pairs, eos_token="<|im_end|>", pad_token="<|im_end|>", padding_side="left",
        chat_template="{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    )  # fmt: skip
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(
        vocab_size=len(chat), hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=chat.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(llama).save_pretrained(folder / "causal")
    chat.save_pretrained(folder / "causal")


TRAIN = {"epochs": 2, "batch_size": 16, "optimizer": {"kind": "adamw", "lr": 2e-3}}
TOPIC_DATA = {
    "source": "table",
    "path": {"train": "topics-train.jsonl", "test": "topics-test.jsonl"},
    "max_length": 32,
}
CHAT_DATA = {
    "source": "table", "path": {"train": "chats-train.jsonl", "test": "chats-test.jsonl"}, "task": "causal",
    "text": "messages", "max_length": 64,
}  # fmt: skip
HALF = {"model": "teacher", "layers": 2, "map": "linspace"}

RECIPES: dict[str, dict[str, Any]] = {
    "digits": {
        "data": {"source": "digits", "labels": 100},
        "teacher": {"model": "convnet", "options": {"widths": [16, 32]}, "train": {"epochs": 6}},
        "student": {"model": "mlp", "options": {"hidden": [16]}},
        "method": {"kind": "logit", "temperature": 4, "alpha": 0.9},
        "train": {"epochs": 8, "batch_size": 64, "optimizer": {"kind": "adamw", "lr": 5e-3}},
        "seeds": [0, 1],
    },
    "digits-features": {
        "data": {"source": "digits", "augment": ["shift"]},
        "teacher": {"model": "convnet", "options": {"widths": [8, 16]}, "train": {"epochs": 2}},
        "student": {"model": "convnet", "options": {"widths": [4, 8]}},
        "method": {"kind": "feature", "alpha": 0.5},
        "train": {"epochs": 2, "batch_size": 64, "ema": 0.9},
        "seeds": [0],
    },
    "classify-text": {
        "data": TOPIC_DATA | {"label": "label"},
        "teacher": {"model": "hf:encoder", "train": TRAIN},
        "student": HALF,
        "method": {"kind": "logit", "temperature": 2, "alpha": 0.9},
        "train": TRAIN,
        "seeds": [0, 1],
    },
    "sentence-embedding": {
        "data": TOPIC_DATA | {"task": "embedding"},
        "teacher": "hf:encoder",
        "student": HALF,
        "method": {"kind": "embedding"},
        "train": TRAIN,
        "seeds": [0],
    },
    "token": {
        "data": CHAT_DATA,
        "teacher": {"model": "hf:causal"},
        "student": HALF,
        "method": {"kind": "token", "divergence": "skew_kl"},
        "train": TRAIN,
        "seeds": [0],
    },
    "on-policy": {
        "data": CHAT_DATA,
        "teacher": {"model": "hf:causal"},
        "student": HALF,
        "method": {"kind": "on-policy", "lmbda": 0.5, "max_new": 8},
        "train": TRAIN | {"epochs": 1},
        "seeds": [0],
        "baseline": False,
    },
}
"""The cases that train, in the words of the commit before."""


# Results ---------------------------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Chat completions that are a function of the prompt."""

    def do_POST(self) -> None:
        """Answer one request."""
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = request["messages"][-1]["content"]
        draw, words = random.Random(prompt), [*FILLER.split(), *TOPICS["net"].split()]
        text = " ".join(draw.choice(words) for _ in range(draw.randint(8, 30)))
        usage = {"prompt_tokens": 9, "completion_tokens": 20, "total_tokens": 29}
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        reply = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [choice],
            "usage": usage,
        }
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Be silent."""


def renamed(value: Any, names: dict[str, str]) -> Any:
    """A recipe or summary with its keys in the new words."""
    if isinstance(value, dict):
        return {names.get(key, key): renamed(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [renamed(inner, names) for inner in value]
    return value


def in_new_words(text: str) -> str:
    """A name such as ``alone-seed0`` or a path of keys, in the new words."""
    for before, now in RENAMED.items():
        text = re.sub(rf"(?<![a-z]){before}(?![a-z])", now, text)
    return text


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a summary with its path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from leaves(inner, f"{path}/{key}")
    else:
        yield path, value


def outcome(folder: Path, *, before: bool) -> dict[str, Any]:
    """What a run left: figures by path, and digests of models and data."""
    words: Callable[[str], str] = in_new_words if before else str
    result: dict[str, Any] = {}
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for path, value in leaves(summary):
        if not IGNORED.search(path):
            result[words(path)] = words(value) if isinstance(value, str) else value
    files = [*folder.rglob("*.safetensors"), *folder.glob("data/*")]
    for path in sorted(files):
        if "checkpoints" not in path.parts:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            result[words(f"sha256 {path.relative_to(folder)}")] = digest
    return result


def run_case(source: Path, command: str, recipe: dict[str, Any], folder: Path, out: Path) -> None:
    """Run one recipe with the package in ``source``."""
    out.parent.mkdir(exist_ok=True)
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    environment = {
        **os.environ, "PYTHONPATH": str(source / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tutelage", command, str(path), "--out", str(out)],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(
            f"{command} {path}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )


def results(sources: dict[str, Path], only: list[str], folder: Path) -> dict[str, Any]:
    """Run every case on both commits and compare what they left."""
    write_inputs(folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = {"url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m", "concurrency": 4}
    generation = {"kind": "answer", "prompts": "prompts.jsonl", "endpoint": endpoint, "held_out": 8}
    generation |= {"quality": {"near": None}}
    cases = {
        **{name: ("run", recipe) for name, recipe in RECIPES.items()},
        "generate": ("generate", {"generate": generation}),
    }
    report: dict[str, Any] = {}
    for name, (command, recipe) in cases.items():
        if only and name not in only:
            continue
        left = {}
        for which, source in sources.items():
            words = recipe if which == "before" else renamed(recipe, RECIPE_KEYS)
            run_case(source, command, words, folder, folder / which / name)
            left[which] = outcome(folder / which / name, before=which == "before")
        before, now = left["before"], left["now"]
        different = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        weights = [key for key in now if key.startswith("sha256")]
        report[name] = {
            "figures": len(now) - len(weights), "files": len(weights),
            "student": next((v for k, v in now.items() if k.startswith("sha256 student/")), None),
            "different": {key: [before.get(key), now.get(key)] for key in different},
        }  # fmt: skip
        verdict = "equal" if not different else f"{len(different)} DIFFERENT"
        print(f"{name}: {len(now) - len(weights)} figures, {len(weights)} files: {verdict}", flush=True)
        for key in different[:20]:
            print(f"    {key}: {before.get(key)} -> {now.get(key)}")
    return report


# Speed -----------------------------------------------------------------------------------------------------------

PROBE = ROOT / "benchmarks" / "step_probe.py"
"""What one process measures: seconds of a step."""


def probe(source: Path, what: str) -> float:
    """Seconds of a step with the package in ``source``."""
    environment = {**os.environ, "PYTHONPATH": str(source / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    room = "losses" if (source / "src/tutelage/losses").is_dir() else "objectives"
    done = subprocess.run(
        [sys.executable, str(PROBE), what, room], env=environment, capture_output=True, text=True, check=False
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    if line is None:
        raise SystemExit(f"{what} in {source}:\n{done.stderr[-4000:]}")
    return float(line.split()[1])


def speed(sources: dict[str, Path], only: list[str], rounds: int) -> dict[str, Any]:
    """Time both commits in turn."""
    report = {}
    for what in only or ["engine", "cached", "language", "token-loss"]:
        times: dict[str, list[float]] = {which: [] for which in sources}
        for number in range(rounds):
            for which in list(sources)[:: 1 if number % 2 else -1]:
                times[which].append(probe(sources[which], what))
        ratios = [now / before for before, now in zip(times["before"], times["now"], strict=True)]
        report[what] = {
            "ratio": statistics.median(ratios), "ratios": sorted(ratios),
            "ms": {which: 1000 * statistics.median(values) for which, values in times.items()},
            "fastest_ms": {which: 1000 * min(values) for which, values in times.items()},
        }  # fmt: skip
        one = report[what]
        print(f"{what}: now / before {one['ratio']:.3f}  {one['ms']}  fastest {one['fastest_ms']}", flush=True)
    return report


# Commands --------------------------------------------------------------------------------------------------------

LIST_COMMANDS = """
import json
from typer.main import get_command
from tutelage.cli import app
def walk(command, path):
    yield path, sorted(name for p in command.params for name in p.opts)
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, f"{path} {name}")
print(json.dumps(dict(walk(get_command(app), "tutelage"))))
"""


def commands(sources: dict[str, Path]) -> dict[str, Any]:
    """Names of all commands, arguments and options of both commits, and what only one of them has."""
    known = {}
    for which, source in sources.items():
        environment = {**os.environ, "PYTHONPATH": str(source / "src")}
        done = subprocess.run(
            [sys.executable, "-c", LIST_COMMANDS], env=environment, capture_output=True, text=True, check=True
        )
        known[which] = {f"{path} {name}" for path, names in json.loads(done.stdout).items() for name in names}
    gone, new = sorted(known["before"] - known["now"]), sorted(known["now"] - known["before"])
    print(f"{len(known['now'])} names of options and arguments; gone: {gone or 'none'}; new: {new or 'none'}")
    return {"names": len(known["now"]), "gone": gone, "new": new}


def main() -> None:
    """Compare and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("results", "speed", "commands"))
    parser.add_argument("commit", help="the commit before, or a folder that holds its checkout")
    parser.add_argument("--only", nargs="*", default=[], help="names of cases")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--keep", type=Path, help="folder for the runs. Default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        before = Path(options.commit).resolve()
        if not before.is_dir():
            before = Path(scratch, "before")
            subprocess.run(["git", "-C", ROOT, "worktree", "add", "--detach", before, options.commit], check=True)
        try:
            sources = {"before": before, "now": ROOT}
            if options.what == "results":
                folder = options.keep or Path(scratch, "runs")
                folder.mkdir(parents=True, exist_ok=True)
                report = results(sources, options.only, folder)
            elif options.what == "commands":
                report = commands(sources)
            else:
                report = speed(sources, options.only, options.rounds)
        finally:
            if before.is_relative_to(scratch):
                subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", before], check=False)
    if not options.only:
        out = ROOT / "results" / f"compare-commits-{options.what}.json"
        out.write_text(json.dumps({"commit": options.commit, **report}, indent=1) + "\n", encoding="utf-8")
        print(f"written: {out.relative_to(ROOT)}")
    if options.what == "results" and any(case["different"] for case in report.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
