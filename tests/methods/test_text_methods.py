"""Methods of text encoders: layers of any family, training, and clear errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

import tutelage
from support.text_method_cases import CASES, CLS, PAD, SEP, VOCABULARY, batch, fit, make, models, seen
from tutelage.config import METHOD_KINDS, build_recipe
from tutelage.data import Batch
from tutelage.errors import CapabilityError, ConfigError, ModelError
from tutelage.losses import chunked
from tutelage.methods import (
    METHODS,
    DistillationModule,
    EmbeddingMethod,
    Method,
    MinilmMethod,
    PatientMethod,
    TinybertMethod,
    TripleMethod,
)
from tutelage.methods.transformer_layers import find_layers, map_layers
from tutelage.taps import Needs, observe
from tutelage.teachers import LiveTeacher


def test_widths_that_differ_get_projectors_that_are_trained_and_no_student() -> None:
    b = batch()
    student, teacher = make(seed=1), make(seed=2, width=24, heads=2)
    method = fit(TinybertMethod(prediction=0), student, teacher, b)
    shapes = {name: tuple(p.body.weight.shape) for name, p in method.hidden.projectors.items()}
    assert shapes == {"embedding": (24, 16), "hidden": (24, 16)}
    sum(seen(student, teacher, method, b).values()).backward()
    assert all(p.grad is not None for p in method.parameters())
    equal = fit(TinybertMethod(prediction=0), student, make(seed=3), b)
    assert not list(equal.parameters())
    triple = fit(TripleMethod(), student, teacher, b)
    assert triple.projector.body.weight.shape == (24, 16)
    assert not list(fit(MinilmMethod(), student, teacher, b).parameters())


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (lambda: TinybertMethod(prediction=0), "2 heads of attention, the teacher's layer 1 has 4(.|\n)*heads: mean"),
        (lambda: MinilmMethod(version=1), "2 heads of attention, the teacher 4(.|\n)*version: 2"),
    ],
)  # fmt: skip
def test_heads_that_differ_are_refused_or_averaged(method: Callable[[], Method], says: str) -> None:
    student, teacher, b = make(seed=1), make(seed=2, heads=4), batch()
    with pytest.raises(ModelError, match=says):
        fit(method(), student, teacher, b)
    for other in (
        TinybertMethod(prediction=0, heads="mean"),
        MinilmMethod(version=1, heads="mean"),
        MinilmMethod(version=2),
    ):
        assert all(float(v.detach()) > 0 for v in seen(student, teacher, fit(other, student, teacher, b), b).values())


def test_maps_of_layers() -> None:
    b = batch()

    def found(layers: Any, student: int, teacher: int, **more: Any) -> list[tuple[int, int]]:
        mine = find_layers("student", make(layers=student), b)
        return map_layers(layers, mine, find_layers("teacher", make(layers=teacher), b), **more)

    assert found("uniform", 3, 6) == [(1, 2), (2, 4), (3, 6)]
    assert found("uniform", 2, 5) == [(1, 3), (2, 5)]
    assert found("last", 2, 5) == [(1, 4), (2, 5)]
    assert found("skip", 3, 6, exclude_last=True) == [(1, 2), (2, 4)]
    assert found("last", 3, 6, exclude_last=True) == [(1, 4), (2, 5)]
    assert found([None, 3], 2, 5) == [(2, 3)]
    with pytest.raises(ModelError, match=r"give 2 numbers from 1 to 4"):
        found([1, 2, 3], 2, 4)
    with pytest.raises(ModelError, match=r"give 2 numbers from 1 to 4"):
        found([1, 5], 2, 4)
    with pytest.raises(ModelError, match="no layer is left"):
        found("skip", 1, 4, exclude_last=True)
    with pytest.raises(ModelError, match="4 layers, the teacher 2"):
        found("last", 4, 2)


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 32, "max_position_embeddings": 40, "pad_token_id": PAD,
}  # fmt: skip


FAMILIES: dict[str, tuple[Callable[[], nn.Module], str, bool]] = {
    "bert": (lambda: BertForMaskedLM(BertConfig(**SIZES)), "attention.self.value", True),
    "roberta": (lambda: RobertaForMaskedLM(RobertaConfig(**SIZES)), "attention.self.value", True),
    "electra": (lambda: ElectraForMaskedLM(ElectraConfig(**SIZES, embedding_size=12)), "self.value", True),
    "distilbert": (
        lambda: DistilBertForMaskedLM(
            DistilBertConfig(
                vocab_size=VOCABULARY, dim=24, n_layers=3, n_heads=4, hidden_dim=32, max_position_embeddings=40
            )
        ),
        "attention.v_lin",
        True,
    ),
    "albert": (lambda: AlbertForMaskedLM(AlbertConfig(**SIZES, embedding_size=12)), "attention.value@2", True),
    "modernbert": (
        lambda: ModernBertForMaskedLM(
            ModernBertConfig(
                **SIZES, global_attn_every_n_layers=2, local_attention=8, cls_token_id=CLS, sep_token_id=SEP,
                bos_token_id=CLS, eos_token_id=SEP,
            )
        ),
        "attn.Wqkv",
        False,
    ),
    "deberta": (
        lambda: DebertaV2ForMaskedLM(
            DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8)
        ),
        "value_proj",
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_queries_keys_and_values_are_found_in_any_family(family: str) -> None:
    torch.manual_seed(0)
    factory, value, plain = FAMILIES[family]
    model, b = factory().eval(), batch()
    training = {name: m.training for name, m in model.named_modules()}
    stack = find_layers("teacher", model, b)
    (attention,) = stack.attentions([3])
    assert attention.values.tap.endswith(value)
    assert (attention.plain, attention.heads) == (plain, 4)
    assert len({attention.queries, attention.keys, attention.values}) == 3
    taps = (stack.embeddings, *(layer.output for layer in stack.layers), stack.last)
    with torch.no_grad():
        observed = observe(model, b.inputs, Needs(hidden=tuple(dict.fromkeys(taps)))).hidden
        said = model(**b.inputs, output_hidden_states=True).hidden_states
    for tap, state in zip(taps[:-2], said, strict=False):
        torch.testing.assert_close(observed[tap], state)
    torch.testing.assert_close(observed[stack.last], said[-1])
    assert training == {name: m.training for name, m in model.named_modules()}
    method = fit(MinilmMethod(), make(seed=4), model, b)
    assert set(seen(make(seed=4), model, method, b)) == {"queries", "keys", "values"}
    if not plain:
        for refused in (MinilmMethod(version=1), TinybertMethod(prediction=0)):
            with pytest.raises(ModelError, match="rotary or relative positions"):
                fit(refused, make(seed=4), model, b)
        fit(TinybertMethod(prediction=0, attention=0), make(seed=4), model, b)


def test_values_of_a_fused_layer_are_what_attention_takes_in() -> None:
    torch.manual_seed(0)
    model, b = FAMILIES["modernbert"][0]().eval(), batch()
    part = find_layers("teacher", model, b).attentions([1])[0]
    assert [(p.start, p.stop) for p in (part.queries, part.keys, part.values)] == [(0, 24), (24, 48), (48, 72)]


@pytest.mark.parametrize("name", CASES)
def test_every_method_trains_and_its_terms_fall(name: str) -> None:
    factory, kind, task = CASES[name]
    student, teacher = models(kind)
    b = batch(task)
    method = fit(factory(), student, teacher, b)
    module = DistillationModule(student, method)
    signal = LiveTeacher(teacher).signal(b, method.needs)
    optimizer = torch.optim.Adam(module.parameters(), lr=5e-3)
    totals: list[float] = []
    first: dict[str, float] = {}
    for _ in range(30):
        terms = module(b, signal)
        means = {n: t.sum / t.count.clamp(min=1) for n, t in terms.items()}
        first = first or {n: float(v.detach()) for n, v in means.items()}
        loss = torch.stack([method.weights[n] * v for n, v in means.items()]).sum()
        totals.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module.close()
    assert totals[-1] < 0.9 * totals[0]
    pulled = {"ce", "prediction", *(["kd"] if "patient" in name else [])}  # what weighs little beside the others
    assert all(float(v.detach()) < first[n] for n, v in means.items() if n not in pulled)


def train(teacher: nn.Module, loader: list[Batch]) -> None:
    """A teacher must be better than chance."""
    optimizer = torch.optim.Adam(teacher.parameters(), lr=5e-3)
    for b in loader * 10:
        optimizer.zero_grad()
        F.cross_entropy(teacher(**b.inputs).logits.flatten(0, -2), b.labels.flatten()).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("method", "task", "terms"),
    [
        (TripleMethod(), "mlm", {"mlm", "kd", "cosine"}),
        (TinybertMethod(stage1_fraction=0.5), "texts", {"embedding", "hidden", "attention", "prediction"}),
        (PatientMethod(), "texts", {"kd", "ce", "patient"}),
    ],
    ids=["triple", "tinybert", "patient"],
)  # fmt: skip
def test_distill_takes_every_stage(method: Method, task: str, terms: set[str], tmp_path: Path) -> None:
    kind = BertForMaskedLM if task == "mlm" else BertForSequenceClassification
    student, teacher = models(kind)
    loader = [batch(task, seed=i) for i in range(3)]
    train(teacher, loader)
    run = tutelage.distill(
        teacher, student, loader, eval_data=loader, method=method, epochs=4, lr=5e-3, baseline=False,
        out=tmp_path / "run", verbose=False, train={"log_every": 1},
    )  # fmt: skip
    logged = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert all(f'"{term}"' in logged for term in terms)
    assert type(run.student) is kind
    assert not any("projector" in name for name, _ in run.student.named_parameters())


def test_the_engine_says_before_how_terms_are_weighted_so_one_gradient_serves_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Shares of a micro-batch are not those of the step; terms that are weighted otherwise are projected twice."""
    student, teacher = make(seed=1), make(seed=2)
    loader = [batch(seed=i) for i in range(4)]
    for b in loader[::2]:
        b.labels[0] = -100  # uneven
    train(teacher, loader)
    factors: list[Tensor | None] = []
    common = chunked._common_factor

    def watched(*args: Any) -> Tensor | None:
        factors.append(common(*args))
        return factors[-1]

    monkeypatch.setattr(chunked, "_common_factor", watched)
    tutelage.distill(
        teacher, student, loader, eval_data=loader, method=TripleMethod(cosine=0), epochs=2, baseline=False,
        out=tmp_path / "run", verbose=False, train={"accumulate": 2}
    )  # fmt: skip
    assert len(factors) == 2 * 2 * len(loader)  # epochs, and parts of each batch
    assert all(factor is not None for factor in factors)


@pytest.mark.parametrize(
    ("method", "student", "teacher", "task", "error", "says"),
    [
        (TripleMethod(), BertForMaskedLM, BertModel, "mlm", CapabilityError, "the teacher, BertModel, has no head"),
        (TripleMethod(), BertModel, BertForMaskedLM, "mlm", CapabilityError, "the student(.|\n)*kd: 0 and mlm: 0"),
        (TripleMethod(), BertForMaskedLM, BertForMaskedLM, "texts", CapabilityError, "needs one for each token"),
        (MinilmMethod(layer=9), BertModel, BertModel, "plain", ModelError, "layer 9 of a teacher with 2"),
        (MinilmMethod(relation_heads=5), BertModel, BertModel, "plain", ModelError, "give one of 1, 2, 4, 8, 16"),
        (EmbeddingMethod(), BertForMaskedLM, BertForMaskedLM, "plain", ModelError, "one vector for each text"),
    ],
)  # fmt: skip
def test_what_does_not_fit_says_so(
    method: Method, student: Any, teacher: Any, task: str, error: type[Exception], says: str
) -> None:
    b, mine, theirs = batch(task), make(student, 1), make(teacher, 2)
    with pytest.raises(error, match=says):
        seen(mine, theirs, fit(method, mine, theirs, b), b)


def test_vocabularies_and_classes_and_tokens_that_differ_say_so() -> None:
    b, student = batch(), make(seed=1)
    torch.manual_seed(0)
    other = BertForMaskedLM(BertConfig(**{**SIZES, "vocab_size": 44}))
    with pytest.raises(CapabilityError, match="scores 40 tokens, the teacher 44"):
        fit(TripleMethod(), student, other, b)
    shorter = replace(b, teacher_inputs={k: v[:, :5] for k, v in b.inputs.items()})
    for method in (TripleMethod(), TinybertMethod(prediction=0), MinilmMethod(version=1), MinilmMethod(version=2)):
        with pytest.raises(CapabilityError, match="reads 9 tokens of a text, the teacher 5"):
            seen(student, make(seed=2), fit(method, student, make(seed=2), shorter), shorter)
    kind, texts = BertForSequenceClassification, batch("texts")
    three, two = make(kind, 1, num_labels=3, layers=2), make(kind, 2, num_labels=2)
    for method in (PatientMethod(), TinybertMethod(stage1_fraction=0)):
        with pytest.raises(CapabilityError, match="the same classes in the same order"):
            seen(three, two, fit(method, three, two, texts), texts)
    images = Batch(torch.randn(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))
    with pytest.raises(CapabilityError, match="tokens of texts"):
        fit(MinilmMethod(), student, student, images)
    with pytest.raises(ModelError, match="no layers are found in the student, Flat"):
        find_layers("student", Flat(), b)


class Flat(nn.Linear):
    """Reads tokens and has no layers."""

    def __init__(self) -> None:
        super().__init__(1, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids.unsqueeze(-1).float())


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("triple", {"mlm": -1}, "at least 0"),
        ("triple", {"mlm": 0, "kd": 0, "cosine": 0}, "are all 0"),
        ("triple", {"positions": "some"}, "counted or masked"),
        ("triple", {"temperature": 0}, "above 0"),
        ("tinybert", {"layers": "skip"}, "uniform"),
        ("tinybert", {"layers": [0, 2]}, "at least 1"),
        ("tinybert", {"prediction": 0, "stage1_fraction": 0.5}, "leave it out"),
        ("minilm", {"version": 1, "queries": 1.0}, "version 1 has no term"),
        ("minilm", {"version": 3}, "1 or 2"),
        ("patient", {"alpha": 2.0}, "at most 1"),
        ("embedding", {"mse": 0, "similarity": 0}, "are all 0"),
    ],
)
def test_options_that_cannot_be_say_so(kind: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        METHODS[kind](**options)


RECIPE: dict[str, Any] = {
    "name": "texts", "data": {"source": "digits"}, "teacher": {"model": "convnet", "train": {}}, "student": "convnet",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["triple", "tinybert", "minilm", "patient", "embedding"])
def test_a_recipe_makes_each_method_with_the_same_defaults(kind: str) -> None:
    section = build_recipe({**RECIPE, "method": {"kind": kind}}).method
    assert isinstance(section, METHOD_KINDS[kind])
    made, plain = METHODS[kind](**section.model_dump(exclude={"kind"})), METHODS[kind]()
    assert made.formula() == plain.formula()
    assert made.weights == plain.weights


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"kind": "tinybert", "prediction": 0, "stage1_fraction": 0.5}, "one of its two stages"),
        ({"kind": "tinybert", "layers": "every"}, "uniform"),
        ({"kind": "minilm", "version": 1, "keys": 1}, "version 1 has no term 'keys'"),
        ({"kind": "patient", "alpha": 2}, "give at most 1, or 'hard' too"),
        ({"kind": "triple", "cosin": 1}, "cosine"),
    ],
)
def test_a_recipe_says_at_once_what_is_wrong(method: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_recipe({**RECIPE, "method": method})
    listed = build_recipe({**RECIPE, "method": {"kind": "tinybert", "layers": [None, 4]}}).method
    assert METHODS["tinybert"](**listed.model_dump(exclude={"kind"})).hidden.options.layers == [None, 4]
