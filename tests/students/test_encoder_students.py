"""Students cut from transformers models. Each test is named after what would go wrong unseen."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from support import python
from tutelage.errors import ConfigError, DataError, ModelError
from tutelage.students import block_influence, prune, select_layers
from tutelage.students.config_probing import layer_pattern
from tutelage.students.layer_selection import find_layer_stack
from tutelage.students.width_pruning import find_weight_layout

SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "num_labels": 3,
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = ("bert", "roberta", "distilbert", "modernbert", "electra", "deberta")


def config(family: str, **changes: Any) -> Any:
    sizes = {**SIZES, **changes}
    return {
        "bert": lambda: hf.BertConfig(**sizes),
        "roberta": lambda: hf.RobertaConfig(**sizes),
        "distilbert": lambda: hf.DistilBertConfig(hidden_dim=sizes.pop("intermediate_size"), **sizes),
        "modernbert": lambda: hf.ModernBertConfig(
            **{"local_attention": 4, "cls_token_id": 1, "sep_token_id": 2, **TOKENS, **sizes}
        ),
        "electra": lambda: hf.ElectraConfig(**{"embedding_size": 16, **sizes}),
        "deberta": lambda: hf.DebertaV2Config(
            **{"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm", **sizes}
        ),
        "llama": lambda: hf.LlamaConfig(num_key_value_heads=2, **TOKENS, **sizes),
    }[family]()


def build(family: str, task: str = "SequenceClassification", **changes: Any) -> Any:
    """A model with no weight that is 0 or 1, so that none can be forgotten unseen."""
    kind = getattr(hf, f"AutoModelFor{task}") if task else hf.AutoModel
    model = kind.from_config(config(family, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.3 + (0.5 if p.ndim == 1 else 0.0))
    return model


def inputs(length: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (3, length), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def said(model: nn.Module, given: dict[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**(given or inputs()))[0]
    return out


def zero(model: nn.Module, role: str, dead: list[int], reads: bool) -> None:
    """Of the units ``dead``, take away what they are given, or what is made of them."""
    path, _ = find_layer_stack(model)
    parts = find_weight_layout(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            axis = parts.axes.get((layer_pattern(name, path), int(reads)))
            if axis is not None and axis.role == role and p.ndim > int(reads):
                p.index_fill_(int(reads), axis.positions(torch.tensor(dead), parts.units[role]), 0)


# Layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_holds_the_weights_of_the_layer_that_the_map_says(family: str) -> None:
    teacher = build(family)
    found = prune(teacher, layers=2)
    assert found.layers == (0, 2)
    path, theirs = find_layer_stack(teacher)
    for layer, source in enumerate(found.layers):
        mine = found.model.get_submodule(f"{path}.{layer}").state_dict()
        assert mine
        for name, value in mine.items():
            assert torch.equal(value, theirs[source].state_dict()[name]), (layer, name)
    for name, value in found.model.state_dict().items():
        if not name.startswith(f"{path}."):
            assert torch.equal(value, teacher.state_dict()[name]), name
    assert found.model.config.num_hidden_layers == 2
    assert teacher.config.num_hidden_layers == len(theirs) == 4
    memory = {p.data_ptr() for p in teacher.parameters()}
    assert not memory & {p.data_ptr() for p in found.model.parameters()}
    assert type(found.model) is type(teacher)
    assert said(found.model).isfinite().all()
    assert (found.missing_keys, found.unexpected_keys) == ((), ())


@pytest.mark.parametrize("family", [*FAMILIES, "llama"])
def test_a_cut_that_takes_nothing_out_changes_nothing(family: str) -> None:
    teacher = build(family)
    whole = prune(teacher, layers=4, map="linspace", width=32, intermediate=48, heads=4)
    assert torch.equal(said(whole.model), said(teacher))


def test_lists_of_one_entry_for_each_layer_follow_their_layers() -> None:
    teacher = build("modernbert", layer_types=["full_attention", *["sliding_attention"] * 2, "full_attention"])
    silent = [1, 2]
    with torch.no_grad():
        for layer in silent:
            for name, p in find_layer_stack(teacher)[1][layer].named_parameters():
                if name in ("attn.Wo.weight", "mlp.Wo.weight"):
                    p.zero_()
    found = prune(teacher, map=[0, 3])
    assert found.model.config.layer_types == ["full_attention"] * 2
    torch.testing.assert_close(said(found.model), said(teacher))
    uncut = prune(teacher, map=[0, 1]).model  # a sliding window sees less
    with torch.no_grad():
        find_layer_stack(uncut)[1][1].load_state_dict(find_layer_stack(teacher)[1][3].state_dict())
    assert not torch.allclose(said(uncut), said(teacher), atol=1e-3)


def test_a_list_that_only_happens_to_be_as_long_as_the_model_is_deep_stays() -> None:
    for relative in (True, False):
        teacher = build("deberta", num_hidden_layers=2, relative_attention=relative)
        assert prune(teacher, layers=1).model.config.pos_att_type == ["p2c", "c2p"]


def test_what_finds_no_place_in_the_student_is_told() -> None:
    found = prune(build("modernbert"), map=[1, 0])
    assert found.unexpected_keys == ("model.layers.1.attn_norm.weight",)
    assert found.missing_keys == ("model.layers.1.attn_norm.weight",)


def test_maps() -> None:
    assert select_layers("every-other", 12, 6) == [0, 2, 4, 6, 8, 10]
    assert select_layers("every-other", 5, 3) == [0, 2, 4]
    assert select_layers("linspace", 12, 6) == [0, 2, 4, 7, 9, 11]  # DistilBERT's own
    assert select_layers("linspace", 6, 1) == [0]
    assert select_layers("first", 6, 3) == [0, 1, 2]
    assert select_layers("last", 6, 3) == [3, 4, 5]
    assert select_layers([5, 0, 0], 6, 3) == [5, 0, 0]
    assert select_layers("influence", 4, 2, importance=[0.1, 0.9, 0.2, 0.3]) == [1, 3]


def test_influence_of_a_layer_that_does_nothing_is_none_and_padding_does_not_count() -> None:
    teacher = build("llama")
    silent = find_layer_stack(teacher)[1][1]
    with torch.no_grad():
        silent.self_attn.o_proj.weight.zero_()
        silent.mlp.down_proj.weight.zero_()
    short = inputs(7)
    padded = {
        "input_ids": torch.cat([short["input_ids"], torch.full((3, 5), 9)], 1),
        "attention_mask": torch.cat([short["attention_mask"], torch.zeros(3, 5, dtype=torch.long)], 1),
    }
    found = block_influence(teacher, [short])
    assert found[1] == pytest.approx(0, abs=1e-6)
    assert min(found[0], found[2], found[3]) > 0.01
    assert block_influence(teacher, [padded]) == pytest.approx(found, abs=1e-5)
    assert prune(teacher, layers=3, map="influence", importance=found).layers == (0, 2, 3)


def test_a_random_student_is_drawn_by_its_seed_and_has_nothing_of_the_teacher() -> None:
    teacher = build("bert")
    one, two, other = (prune(teacher, layers=2, initial="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(said(one.model), said(two.model))
    assert not torch.equal(said(one.model), said(other.model))
    assert set(one.missing_keys) == set(one.model.state_dict())
    theirs = teacher.state_dict()
    assert not any(torch.equal(x, theirs[name]) for name, x in one.model.state_dict().items())


# Widths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "llama"])
def test_feed_forward_units_that_do_nothing_are_the_ones_that_go(family: str, reads: bool) -> None:
    teacher = build(family)
    zero(teacher, "intermediate", [0, 3, 7, 40, 47], reads)
    found = prune(teacher, intermediate=43)
    torch.testing.assert_close(said(found.model), said(teacher))
    assert not torch.allclose(said(prune(teacher, intermediate=40).model), said(teacher), atol=1e-4)


def test_heads_that_do_nothing_go_with_the_keys_that_they_share() -> None:
    teacher = build("llama")
    zero(teacher, "heads", [0], True)
    found = prune(teacher, heads=2, layers=2, map="first")
    assert (found.model.config.num_attention_heads, found.model.config.num_key_value_heads) == (2, 1)
    torch.testing.assert_close(said(found.model), said(prune(teacher, layers=2, map="first").model))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "deberta"])
def test_a_teacher_whose_units_come_in_pairs_is_halved_without_a_change(family: str) -> None:
    """Twice each hidden unit and head, of which only the first is read: means and variances are those of one half."""
    small = build(family)
    wide = build(family, hidden_size=64, num_attention_heads=8)
    tables = {f"{name}.weight" for name, m in wide.named_modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, p in wide.named_parameters():
            x = small.get_parameter(name)
            for i in range(x.ndim):
                if p.shape[i] != x.shape[i]:
                    read = i == 1 and name not in tables
                    x = torch.cat([x, torch.zeros_like(x) if read else x], i)
            p.copy_(x)
    torch.testing.assert_close(said(wide), said(small), rtol=1e-4, atol=1e-4)
    found = prune(wide, width=32)
    assert (found.model.config.hidden_size, found.model.config.num_attention_heads) == (32, 4)
    torch.testing.assert_close(said(found.model), said(small), rtol=1e-4, atol=1e-4)


def test_a_number_that_must_equal_the_hidden_size_follows_it() -> None:
    teacher = build("electra", task="MaskedLM", embedding_size=32, max_position_embeddings=32)
    found = prune(teacher, width=16)
    assert (found.model.config.embedding_size, found.model.config.max_position_embeddings) == (16, 32)
    assert found.missing_keys == ()
    assert said(found.model).shape == (3, 12, 60)
    bare = prune(build("deberta", task=""), width=16).model  # without the pooler that its config has a width for
    assert bare.config.pooler_hidden_size == 16


def test_half_precision_stays_and_rotary_frequencies_keep_theirs() -> None:
    teacher = build("llama", dtype=torch.bfloat16)
    teacher = hf.AutoModelForSequenceClassification.from_config(teacher.config, dtype=torch.bfloat16).eval()
    found = prune(teacher, map=range(4))
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}
    assert torch.equal(said(found.model), said(teacher))
    mine, theirs = ([b for n, b in m.named_buffers() if "inv_freq" in n] for m in (found.model, teacher))
    assert [b.dtype for b in mine] == [b.dtype for b in theirs]


def test_widths_and_depth_together_give_a_model_that_runs() -> None:
    for family in (*FAMILIES, "llama"):
        teacher = build(family, task="")
        found = prune(teacher, layers=2, width=16, intermediate=20)
        assert found.missing_keys == ()
        assert said(found.model).shape == (3, 12, 16)


# Embeddings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "width"), [("electra", 16), ("electra", 32), ("deberta", 32)])
def test_tables_of_low_rank_are_narrowed_without_a_change(family: str, width: int) -> None:
    teacher = build(family, intermediate_size=6, **({"embedding_size": width} if family == "electra" else {}))
    basis = torch.randn(5, width)
    with torch.no_grad():
        for name, m in teacher.named_modules():
            if isinstance(m, nn.Embedding) and "rel_embeddings" not in name:
                m.weight.copy_(torch.randn(len(m.weight), 5) @ basis)
    found = prune(teacher, embedding=6)
    assert found.model.get_input_embeddings().weight.shape == (60, 6)
    torch.testing.assert_close(said(found.model), said(teacher), rtol=1e-4, atol=1e-4)
    assert found.missing_keys == ()
    with_head = prune(build(family, task="MaskedLM"), embedding=6, layers=2)
    assert with_head.missing_keys  # what leads back to the embeddings' width is not the old one cut
    assert all("deberta." not in name and "electra." not in name for name in with_head.missing_keys)
    assert said(with_head.model).shape == (3, 12, 60)
    worse = prune(teacher, embedding=4, layers=2).model
    assert worse.config.embedding_size == 4
    assert said(worse).isfinite().all()


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "llama"])
def test_a_family_that_cannot_have_narrow_embeddings_says_what_can(family: str) -> None:
    with pytest.raises(ModelError, match=r"(?s)no embeddings narrower.*vocabulary.*ELECTRA"):
        prune(build(family), embedding=8)


# Bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"layers": 2, "map": "every_other"}, ConfigError, "is 'every-other' meant"),
        ({"layers": 2, "map": "zzz"}, ConfigError, "allowed: every-other, first"),
        ({"layers": 3}, ConfigError, "need a teacher of 5.*linspace"),
        ({"layers": 5, "map": "first"}, ConfigError, "5 layers cannot be taken from a teacher of 4"),
        ({"layers": 0, "map": "first"}, ConfigError, "0 layers"),
        ({"map": [0, 4]}, ConfigError, "layer 4, and the teacher has 4.*0 to 3"),
        ({"map": [-1]}, ConfigError, "layer -1"),
        ({"map": []}, ConfigError, "lists 0 layers"),
        ({"layers": 3, "map": [0, 1]}, ConfigError, "lists 2 layers, and the student has 3"),
        ({"map": "first"}, ConfigError, "without a number of layers"),
        ({"layers": 2, "map": "influence"}, ConfigError, "block_influence"),
        ({"layers": 2, "importance": [1, 2, 3, 4]}, ConfigError, "importance is given"),
        ({"layers": 2, "initial": "zeros"}, ConfigError, "teacher or random"),
        ({"width": 20}, ConfigError, "each 8 wide.*16 or 24"),
        ({"width": 64}, ConfigError, "1 to 32"),
        ({"heads": 2}, ModelError, "use width=16"),
        ({"heads": 3, "width": 16}, ConfigError, "leave heads out"),
        ({"intermediate": 0}, ConfigError, "1 to 48"),
        ({"embedding": 32}, ConfigError, "2 to 31"),
    ],
)
def test_sizes_and_maps_that_cannot_be(given: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"(?s){message}"):
        prune(build("bert"), **given)


def test_models_without_a_stack_of_layers() -> None:
    with pytest.raises(ModelError, match="not a Hugging Face transformers model"):
        prune(nn.Linear(2, 2), layers=1)
    sizes = {k: v for k, v in SIZES.items() if k != "num_labels"}
    with pytest.raises(ModelError, match="share their weights, such as ALBERT"):
        prune(hf.AlbertModel(hf.AlbertConfig(**sizes, embedding_size=16)), layers=2)
    two = hf.BartConfig(vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)  # fmt: skip
    with pytest.raises(ModelError, match="several stacks"):
        prune(hf.BartModel(two), layers=1)
    shared = build("bert")
    path, stack = find_layer_stack(shared)
    stack[1] = stack[0]
    with pytest.raises(ModelError, match=f"share weights .{path}"):
        prune(shared, layers=2)
    with pytest.raises(ConfigError, match="multiple of 2"):
        prune(build("llama"), heads=3)
    with pytest.raises(DataError, match="no batch"):
        block_influence(build("bert"), [])


def test_a_layout_that_is_not_understood_is_refused_and_not_guessed() -> None:
    sizes = {k: v for k, v in SIZES.items() if k != "num_labels"}
    odd = hf.MPNetModel(hf.MPNetConfig(**sizes))  # its heads share a table that stands outside of the layers
    with pytest.raises(ModelError, match=r"(?s)lays out.*prune its depth"):
        prune(odd, width=16)
    assert prune(odd, layers=2).layers == (0, 2)


# Interchange -----------------------------------------------------------------------------------------

LOADS = """
import sys
import warnings
sys.modules["tutelage"] = None  # whoever imports it fails
import torch, transformers
from safetensors.torch import load_file
folder = sys.argv[1]
for kind, name in [line.split() for line in open(f"{folder}/models.txt")]:
    model = getattr(transformers, kind).from_pretrained(f"{folder}/{name}").eval()
    seen = load_file(f"{folder}/{name}.safetensors")
    with torch.no_grad():
        out = model(input_ids=seen["ids"])[0]
    assert torch.allclose(out, seen["out"], rtol=0, atol=1e-5), (name, (out - seen["out"]).abs().max())
print("equal")
"""


@pytest.mark.slow
def test_students_load_in_plain_transformers(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    lines = []
    for family in (*FAMILIES, "llama"):
        given: dict[str, Any] = {"layers": 2, "width": 16, "intermediate": 20}
        if family in ("electra", "deberta"):
            given["embedding"] = 8
        student: Any = prune(build(family), **given).model
        student.save_pretrained(tmp_path / family)
        ids = inputs()["input_ids"]
        save_file({"ids": ids, "out": said(student, {"input_ids": ids})}, tmp_path / f"{family}.safetensors")
        lines.append(f"AutoModelForSequenceClassification {family}\n")
    (tmp_path / "models.txt").write_text("".join(lines))
    done = python.run(["-c", LOADS, str(tmp_path)])
    assert done.stdout.strip() == "equal", done.stderr


class Positional(nn.Module):
    """A model of transformers as a function of tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def test_a_student_says_the_same_in_onnx_at_any_batch_and_length(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    student = prune(build("bert"), layers=2).model.eval()
    axes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=40)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, which differ by version
        torch.onnx.export(
            Positional(student), tuple(inputs().values()), tmp_path / "student.onnx", input_names=list(inputs()),
            output_names=["logits"], dynamic_shapes=(axes, axes), dynamo=True, verbose=False,
        )  # fmt: skip
    session = onnxruntime.InferenceSession(str(tmp_path / "student.onnx"), providers=["CPUExecutionProvider"])
    for length in (3, 12, 31):
        given = inputs(length)
        given["attention_mask"][1, length // 2 :] = 0
        (found,) = session.run(None, {k: v.numpy() for k, v in given.items()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), student(**given).logits, atol=1e-4, rtol=1e-4)
