"""A small random model of each causal and sequence-to-sequence family of transformers; checks of the product on it.

    python tests/support/families.py            # all families that results/families.json lacks
    python tests/support/families.py ernie4_5   # these again

Each family runs in a process of its own, with a limit of time and memory. For each check the result is ``right``,
``refused`` (by a TutelageError), ``wrong`` or ``error`` (another exception). Writes ``results/families.json`` and
``results/families.md``.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import re
import resource
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.auto import modeling_auto

from tutelage.data import causal_batch
from tutelage.errors import CapabilityError, TutelageError
from tutelage.experiment.save_check import _check_model, _refusal
from tutelage.methods import DistillationModule, prepare_method
from tutelage.methods.step import get_signal, mean_loss
from tutelage.methods.token import TokenMethod
from tutelage.models import load_weights, save_model
from tutelage.students import prune
from tutelage.students.layer_selection import find_layer_stack
from tutelage.taps import Needs, observe
from tutelage.taps.heads import no_cache_arguments
from tutelage.teachers import LiveTeacher

RESULTS = Path(__file__).parents[2] / "results" / "families.json"
SECONDS, MEMORY = 90, 5 << 30
TOLERANCE = 1e-4

VOCABULARY = 320
LAYERS = 8

SIZES = (
    (r"(.*_)?vocab_size(_per_layer_input)?|.*_vocab_size|unpadded_vocab_size", VOCABULARY),
    (r"num_hidden_layers|n_layers?|num_layers|num_blocks|(num_)?(encoder|decoder)_layers", LAYERS),
    (r"hidden_size|d_model|n_embd|embedding_dim|emb_dim|embedding_size|dim_model_base|word_embed_proj_dim", 32),
    (r"(input|output)_embedding_size|attention_hidden_size|lru_width|mamba_d_ssm", 32),
    (r".*intermediate_size.*|.*ffn_dim|d_ff|dff|d_inner|.*ffn_hidden_size|dim_ff|feed_forward_size", 48),
    (r"(num_)?((encoder|decoder|swa)_)?attention_heads|num_(encoder|decoder)_attention_heads|n_heads?|num_heads", 4),
    (r"swa_num_attention_heads|num_attention_heads|linear_num_heads|linear_num_value_heads|index_n_heads", 4),
    (r"(swa_)?num_key_value_heads|num_kv_heads|linear_num_key_heads|num_query_groups", 2),
    (r"(swa_)?head_dim|d_head|d_kv|dim_head|qk_(rope|nope)_head_dim|v_head_dim|index_head_dim|kv_channels", 8),
    (r"linear_(key|value)_head_dim|linear_head_dim|attention_head_size|query_pre_attn_scalar|rotary_dim", 8),
    (r"qk_head_dim|attention_head_dim", 16),
    (r".*_rank|d_rel|.*per_layer_input|router_hidden_size", 8),
    (r"(moe_)?num(_local)?_experts|n_routed_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|n_group|num_expert_group", 2),
    (r"topk_group|n_groups|mamba_n_groups", 1),
    (r"mamba_n_heads|mamba_num_heads|mamba_d_head|mamba_head_dim|mamba_headdim|n_mamba_heads", 8),
    (r"mamba_d_state|state_size|ssm_state_size|chunk_size|mamba_chunk_size|block_size", 8),
    (r".*sliding_window(_size)?|window_size|attention_window_size|local_attention|attention_chunk_size", 8),
    (r"index_topk|keep_window_size", 8),
    (r"n_positions|n_ctx|max_seq_len|max_position_embeddings|.*max_position_embeddings", 128),
    (r"max_(source|target)_positions|context_length|model_max_length", 128),
    (r"time_step_rank|mamba_dt_rank|embed_dim|hidden_channels|rel_extent", 8),
)  # fmt: skip
"""Sizes by the names of fields, first match."""

KEPT = re.compile(r".*token_id|.*_idx|.*kernel.*|.*seed|.*buckets|.*theta|.*factor|.*token_index")

ALTERNATING = ["sliding_attention", "full_attention"] * (LAYERS // 2)

FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_head": 4},
    "gemma3n_text": {
        "num_kv_shared_layers": 4, "layer_types": ALTERNATING, "intermediate_size": [48] * LAYERS,
        "activation_sparsity_pattern": [0.5, 0.0] * (LAYERS // 2),
    },
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * (LAYERS // 2)},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"] * (LAYERS // 2), "hash_seed": 0,
        "hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0,
        "lsh_attention_probs_dropout_prob": 0.0,
    },
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "layer_types": ["mamba", "hybrid"] * (LAYERS // 2), "hybrid_layer_ids": [1, 3, 5, 7],
        "attention_hidden_size": 64, "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""Further fields of some families."""


def small_size(name: str, value: Any) -> Any:
    """A small value in place of a config's default one; ``None`` to keep the default."""
    if type(value) is not int or KEPT.fullmatch(name):
        return None
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            return size
    return 32 if value > 64 else None


def small_fields(kind: type, family: str | None = None) -> dict[str, Any]:
    """Keyword arguments that make the config of a family small."""
    try:
        default = kind()
    except Exception:  # noqa: BLE001  a config may need arguments
        default = None
    fields: dict[str, Any] = {}
    parts = getattr(kind, "sub_configs", {})
    if default is not None:
        for name, value in default.to_dict().items():
            size = small_size(name, value)
            if name.endswith("_token_id"):
                size = 1 if type(value) is int and value >= VOCABULARY else None
            if size is not None:
                fields[name] = size
    if "num_key_value_heads" in fields and {"kv_lora_rank", "qk_rope_head_dim"} & set(default.to_dict()):
        fields["num_key_value_heads"] = 4  # latent attention has no groups
    for name in parts:
        theirs = getattr(default, name, None)
        if theirs is not None and hasattr(theirs, "to_dict"):
            fields[name] = {"model_type": theirs.model_type, **small_fields(type(theirs), theirs.model_type)}
    return fields | FAMILIES.get(family or "", {})


class Family(NamedTuple):
    """A model type of transformers, and the auto class that builds it."""

    name: str
    auto: Any

    @property
    def is_seq2seq(self) -> bool:
        return bool(self.auto is transformers.AutoModelForSeq2SeqLM)

    @property
    def key(self) -> str:
        return f"{self.name}-seq2seq" if self.is_seq2seq else self.name


CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
SEQ2SEQ = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
ALL = {
    family.key: family
    for names, auto in ((CAUSAL, transformers.AutoModelForCausalLM), (SEQ2SEQ, transformers.AutoModelForSeq2SeqLM))
    for family in (Family(name, auto) for name in names)
}


class WrongValueError(Exception):
    """The product's value differs from that of the model."""


def build(family: Family, seed: int = 0) -> Any:
    """A small model whose weights all matter: noise on its initial ones, in evaluation mode."""
    kind = transformers.CONFIG_MAPPING[family.name]
    config = kind(**small_fields(kind, family.name))
    with torch.device("meta"):
        size = sum(p.numel() for p in family.auto.from_config(config).parameters())
    if size > 5_000_000:
        raise ValueError(f"{size:,} parameters are too many")
    torch.manual_seed(seed)
    model = family.auto.from_config(config).float().eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=noise))
    return model


def inputs_of(family: Family, length: int = 20) -> dict[str, Tensor]:
    ids = torch.randint(5, 300, (2, length), generator=torch.Generator().manual_seed(3))
    named = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return named | ({"decoder_input_ids": ids.flip(1)} if family.is_seq2seq else {})


def logits_of(model: Any, family: Family) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs_of(family), **no_cache_arguments(model)).logits
    return logits.float()


def expect_equal(own: Tensor, expected: Tensor, what: str) -> None:
    if own.shape != expected.shape:
        raise WrongValueError(f"{what}: shape {list(own.shape)}, not {list(expected.shape)}")
    if not bool(expected.isfinite().all()):
        raise ValueError("the model's own values are not finite")
    difference = float((own - expected).abs().max())
    if not difference <= TOLERANCE * max(float(expected.abs().max()), 1.0):
        raise WrongValueError(f"{what}: difference {difference:.3g} of {float(expected.abs().max()):.3g}")


def check_head(model: Any, family: Family) -> str:
    """The scores that losses compute from the head are the model's logits."""
    with torch.no_grad():
        head = observe(model, inputs_of(family), Needs(logits=False, head=True)).head
        assert head is not None
        own = head.scores(slice(None)).float()
    expect_equal(own, logits_of(model, family), "scores")
    return "dense" if head.is_dense else ""


def without_layers(teacher: Any, layers: tuple[int, ...], family: Family) -> Tensor:
    """The teacher's logits with the other layers skipped."""

    def skip(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return states if isinstance(output, Tensor) else (states, *output[1:])

    _, stack = find_layer_stack(teacher)
    handles = [x.register_forward_hook(skip, with_kwargs=True) for i, x in enumerate(stack) if i not in layers]
    try:
        return logits_of(teacher, family)
    finally:
        for handle in handles:
            handle.remove()


MAPS: tuple[str, ...] = ("every-other", "first", "last")


def check_depth(model: Any, family: Family) -> str:
    """A student of half the layers computes what the teacher computes without the others."""
    refusals = []
    for name in MAPS:
        try:
            student = prune(model, layers=LAYERS // 2, map=name)
        except TutelageError as error:
            refusals.append((name, error))
            continue
        if student.missing_keys:
            raise WrongValueError(f"{name}: new random weights {', '.join(student.missing_keys[:3])}")
        expected = without_layers(model, student.layers, family)
        expect_equal(logits_of(student.model, family), expected, name)
    if len(refusals) == len(MAPS):
        raise refusals[0][1]
    return "".join(f"{name} refused: {error.what}; " for name, error in refusals)[:300]


def half_student(model: Any) -> Any:
    """A student of half the layers, by the first map that the product allows."""
    for name in MAPS:
        try:
            return prune(model, layers=LAYERS // 2, map=name).model
        except TutelageError:
            continue
    raise CapabilityError("no student of half the layers")


def save_and_reload(model: Any, family: Family) -> None:
    card = {} if family.is_seq2seq else {"task": "causal"}
    expected = logits_of(model, family)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        with _refusal(f"a {type(model).__name__} cannot be loaded after it is saved"):
            _check_model(model, card, Path(name))
        save_model(model, folder, card)
        again = copy.deepcopy(model)
        with torch.no_grad():
            for p in again.parameters():
                p.zero_()
        load_weights(again, folder)
        expect_equal(logits_of(again, family), expected, "load_weights")
        plain = family.auto.from_pretrained(folder).eval()
        expect_equal(logits_of(plain, family), expected, "from_pretrained")


def check_reload(model: Any, family: Family) -> str:
    """The model that a run saved has the same logits when the product and plain transformers load it."""
    save_and_reload(model, family)
    return ""


def check_reload_half(model: Any, family: Family) -> str:
    """The same for its student of half the layers."""
    save_and_reload(half_student(model), family)
    return ""


def check_token_loss(model: Any, family: Family) -> str:
    """One step of token distillation has the loss and the gradient of the dense formula."""
    student = build(family, seed=1)
    batch = causal_batch(inputs_of(family))
    method = prepare_method(TokenMethod(alpha=0.5, temperature=2.0), student, model, batch, 0)
    module = DistillationModule(student, method).train(family.name == "reformer")  # which trains in this mode only
    terms = module(batch, get_signal(LiveTeacher(model), method, batch))
    loss = mean_loss(method, terms)
    loss.backward()
    own = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    student.zero_grad()
    teacher, mask = logits_of(model, family), batch.mask
    logits = student(**inputs_of(family), **no_cache_arguments(student)).logits.float()
    soft = 4 * F.kl_div(
        (logits / 2).log_softmax(-1)[mask], (teacher / 2).softmax(-1)[mask], reduction="batchmean"
    )  # fmt: skip
    dense = 0.5 * soft + 0.5 * F.cross_entropy(logits[mask], batch.labels[mask])
    dense.backward()
    expected = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    expect_equal(loss.detach(), dense.detach(), "loss")
    if not float((own - expected).norm()) <= 1e-3 * float(expected.norm()):
        raise WrongValueError(f"gradient: {float((own - expected).norm() / expected.norm()):.2g} of its norm")
    return ""


CHECKS: dict[str, Callable[[Any, Family], str]] = {
    "head": check_head, "depth": check_depth, "reload": check_reload, "reload_half": check_reload_half,
    "token_loss": check_token_loss,
}  # fmt: skip


def one_line(error: BaseException, most: int = 300) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:most]


def run_checks(family: Family) -> dict[str, dict[str, str]]:
    """The result of each check; of ``build`` alone if the family is not built."""
    try:
        model = build(family)
        logits_of(model, family)
    except Exception as error:  # noqa: BLE001  families raise different errors
        return {"build": {"status": "not built", "detail": one_line(error)}}
    results = {"build": {"status": "right", "detail": type(model).__name__}}
    for name, check in CHECKS.items():
        try:
            results[name] = {"status": "right", "detail": check(copy.deepcopy(model), family)}
        except WrongValueError as error:
            results[name] = {"status": "wrong", "detail": str(error)}
        except TutelageError as error:
            results[name] = {"status": "refused", "detail": error.what[:300]}
        except Exception as error:  # noqa: BLE001
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}, line {where.lineno}"
            results[name] = {"status": "error", "detail": f"{one_line(error)} ({place})"}
    return results


def _child(key: str, connection: Any) -> None:
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    connection.send(run_checks(ALL[key]))


def run_family(key: str) -> dict[str, dict[str, str]]:
    """The results of one family, from a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchao", "transformers", "support.families"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(key, there))
    process.start()
    there.close()
    try:
        results: dict[str, dict[str, str]] = here.recv()
    except EOFError:
        results = {}
    process.join()
    if results:
        return results
    reason = "out of time" if process.exitcode == -signal.SIGALRM else f"ended with {process.exitcode}"
    return {"build": {"status": "not built", "detail": reason}}


def table(found: dict[str, Any]) -> str:
    """The results as a page."""
    results = found["families"]
    built = {key: row for key, row in results.items() if row["build"]["status"] == "right"}
    counts = {
        check: {
            status: sum(row[check]["status"] == status for row in built.values())
            for status in ("right", "refused", "wrong", "error")
        }
        for check in CHECKS
    }
    lines = [
        f"Small random models of the causal and sequence-to-sequence families of transformers "
        f"{found['transformers']}: {len(results)} families, {len(built)} built. Each check compares the product "
        "with the model's own values, tolerance 1e-4. `python tests/support/families.py`",
        "",
        "| check | what | right | refused | wrong | traceback |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {check} | {' '.join((CHECKS[check].__doc__ or '').split())} | "
            + " | ".join(str(n) for n in counts[check].values()) + " |"
            for check in CHECKS
        ),
        "", f"| family | {' | '.join(CHECKS)} |", f"| --- |{' --- |' * len(CHECKS)}",
        *(f"| {key} | {' | '.join(_cell(row[check]) for check in CHECKS)} |" for key, row in sorted(built.items())),
        "", "Not built, so not checked:", "", "| family | reason |", "| --- | --- |",
        *(
            f"| {key} | {_escape(row['build']['detail'][:200])} |"
            for key, row in sorted(results.items()) if key not in built
        ),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _cell(result: dict[str, str]) -> str:
    detail = _escape(result["detail"][:160])
    return f"{result['status']}: {detail}" if detail else result["status"]


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def read(path: Path = RESULTS) -> dict[str, Any]:
    """The table's file: the version of transformers, and the results by family."""
    empty = {"transformers": transformers.__version__, "families": {}}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else empty
    return found


def write(results: dict[str, Any], path: Path) -> None:
    ordered = results | {"families": dict(sorted(results["families"].items()))}
    path.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table(ordered), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*", metavar="FAMILY")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: results/families.json")
    options = parser.parse_args()
    results = read(options.out)
    for key in options.keys or [key for key in ALL if key not in results["families"]]:
        results["families"][key] = row = run_family(key)
        wrong = {name: r for name, r in row.items() if r["status"] not in ("right", "refused")}
        print(key, wrong or "ok", flush=True)
        write(results, options.out)


if __name__ == "__main__":
    from support import families  # the name under which the other processes import this file

    families.main()
