"""Teachers that are no torch modules."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier, RandomForestRegressor
from sklearn.svm import LinearSVC
from torch import Tensor, nn

import tutelage
from tutelage.data import IndexedDataset, as_batch
from tutelage.errors import ConfigError, ModelError
from tutelage.integrations import Distiller
from tutelage.methods import LogitMethod
from tutelage.taps import Needs
from tutelage.teachers import LiveTeacher, StoredProbabilities, as_model, from_estimator, from_onnx

torch.manual_seed(3)
NET = nn.Linear(4, 3, bias=False).requires_grad_(False).eval()
X = torch.randn(24, 4)
Y = NET(X).argmax(1)
LOADER = [(X[i : i + 8], Y[i : i + 8]) for i in (0, 8, 16)]


def scripted() -> Any:
    return torch.jit.script(copy.deepcopy(NET))


def exported() -> Any:
    return torch.export.export(NET, (X,), dynamic_shapes=({0: torch.export.Dim("rows")},))


def onnx(folder: Path) -> Any:
    runtime = pytest.importorskip("onnxruntime")
    path = str(folder / "net.onnx")
    torch.onnx.export(
        NET, (X,), path, dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("rows")},),
        output_names=["scores"],
    )  # fmt: skip
    return runtime.InferenceSession(path)


def as_array(x: Tensor) -> Any:
    return NET(x).numpy().astype(np.float64)


KINDS: dict[str, Any] = {
    "function": lambda _: lambda x: NET(x),
    "array": lambda _: as_array,
    "scripted": lambda _: scripted(),
    "exported": lambda _: exported(),
    "exported-module": lambda _: exported().module(),
    "onnx": onnx,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_teacher_of_any_kind_teaches_as_the_module_does(kind: str, tmp_path: Path) -> None:
    def train(teacher: Any) -> Tensor:
        torch.manual_seed(0)
        student = nn.Linear(4, 3)
        distiller = Distiller(student, teacher, LogitMethod(temperature=2.0, alpha=0.5), example=LOADER[0])
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
        for raw in LOADER:
            for loss in distiller.losses(raw):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return student.weight.detach()

    teacher = KINDS[kind](tmp_path)
    torch.testing.assert_close(train(teacher), train(NET), rtol=0, atol=1e-6)
    if kind not in ("scripted", "array"):  # the whole experiment, in which a summary has no parameters of a teacher
        done = tutelage.distill(
            teacher, nn.Linear(4, 3), LOADER, eval_data=LOADER, epochs=1, baseline=False, out=tmp_path / "run",
            verbose=False,
        )  # fmt: skip
        assert done.summary["teacher"]["accuracy"] == 1.0
        assert done.summary["parameters"]["teacher"] == 0


def logits(teacher: Any, raw: Any) -> Tensor:
    return LiveTeacher(as_model(teacher)).signal(as_batch(raw), Needs()).dense()


def test_an_estimator_gives_the_log_of_its_probabilities() -> None:
    forest = RandomForestClassifier(5, random_state=0).fit(X.numpy(), Y.numpy())
    scores = logits(forest, (X, Y))
    for temperature in (1.0, 4.0):  # an impossible class stays impossible
        p = torch.from_numpy(forest.predict_proba(X.numpy())).float()
        expected = p ** (1 / temperature) / (p ** (1 / temperature)).sum(1, keepdim=True)
        torch.testing.assert_close((scores / temperature).softmax(1), expected, atol=1e-6, rtol=1e-5)


def test_images_and_several_inputs_become_columns() -> None:
    trees = HistGradientBoostingClassifier(max_iter=2, min_samples_leaf=2).fit(X.numpy(), Y.numpy())
    images = X.view(24, 1, 2, 2)
    assert torch.equal(logits(trees, (images, Y)), logits(trees, (X, Y)))
    assert torch.equal(logits(trees, ((X[:, :1], X[:, 1:]), Y)), logits(trees, (X, Y)))


def test_an_estimator_of_a_data_frame_gets_its_columns_by_name() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X.numpy(), columns=list("abcd"))
    trees = HistGradientBoostingClassifier(max_iter=2, min_samples_leaf=2).fit(frame, Y.numpy())
    named = {name: X[:, i] for i, name in reversed(list(enumerate("abcd")))}  # in another order
    assert torch.equal(logits(trees, {**named, "labels": Y}), logits(trees, (X, Y)))


def test_classes_are_found_by_name_or_asked_for() -> None:
    names = np.array(["cat", "dog", "eel"])
    forest = RandomForestClassifier(5, random_state=0).fit(X.numpy(), names[Y.numpy()])
    with pytest.raises(ModelError, match=r"the classes of RandomForestClassifier are 'cat, dog, eel', not label ind"):
        as_model(forest)
    order = ["eel", "cat", "dog", "fox"]
    scores = logits(from_estimator(forest, order), (X, Y)).softmax(1)
    p = torch.from_numpy(forest.predict_proba(X.numpy())).float()
    torch.testing.assert_close(scores, torch.stack([p[:, 2], p[:, 0], p[:, 1], torch.zeros(24)], 1))
    with pytest.raises(ModelError, match="a class 'dog' that is not in classes"):
        from_estimator(forest, ["cat", "eel"])


def test_a_class_that_an_estimator_never_saw_is_impossible() -> None:
    some = Y != 1
    forest = RandomForestClassifier(5, random_state=0).fit(X[some].numpy(), Y[some].numpy())
    assert logits(forest, (X, Y)).softmax(1)[:, 1].max() == 0


def test_a_regressor_gives_numbers_and_several_labels_their_log_odds() -> None:
    regressor = RandomForestRegressor(5, random_state=0).fit(X.numpy(), X[:, 0].numpy())
    scores = logits(regressor, (X, Y))
    np.testing.assert_allclose(scores[:, 0].numpy(), regressor.predict(X.numpy()), rtol=1e-6)
    labels = (X[:, :2] > 0).int().numpy()
    forest = RandomForestClassifier(5, random_state=0).fit(X.numpy(), labels)
    expected = np.stack([p[:, 1] for p in forest.predict_proba(X.numpy())], 1)
    np.testing.assert_allclose(logits(forest, (X, Y)).sigmoid().numpy(), expected, atol=1e-6)


def test_stored_probabilities_come_with_the_batch() -> None:
    p = NET(X).softmax(1)
    batch = {"x": X, "labels": Y, "teacher_probabilities": p}
    torch.testing.assert_close(logits(StoredProbabilities(), batch).softmax(1), p)
    for part in as_batch(batch).split(3):
        assert len(part.for_teacher().inputs) == len(part)


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        (LinearSVC().fit(X.numpy(), Y.numpy()), "CalibratedClassifierCV"),
        (3, "the teacher is of type int"),
        (nn.Linear, "the teacher is of type type"),
    ],
)
def test_what_gives_no_scores_is_refused(teacher: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        as_model(teacher)


def test_rows_that_are_no_probabilities_are_refused() -> None:
    with pytest.raises(ModelError, match=r"a row of the teacher's probabilities is \[1.0, 1.0, 1.0\]"):
        StoredProbabilities()(torch.ones(2, 3))


class Session:
    """An ONNX session with two outputs, as converters of estimators write."""

    def get_outputs(self) -> list[Any]:
        return [type("Output", (), {"name": name}) for name in ("label", "probabilities")]

    def get_inputs(self) -> list[Any]:
        return []

    def run(self, names: list[str], feed: dict[str, Any]) -> list[Any]:
        return []


def test_the_scores_of_several_onnx_outputs_are_named() -> None:
    with pytest.raises(ModelError, match="output='probabilities'"):
        as_model(Session())
    assert from_onnx(Session(), output="probabilities").name == "ONNX model"


def test_outputs_of_a_function_are_cached_under_its_digest_alone(tmp_path: Path) -> None:
    data = IndexedDataset(torch.utils.data.TensorDataset(X, Y))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    options: dict[str, Any] = {"eval_data": LOADER, "epochs": 1, "baseline": False, "verbose": False}
    with pytest.raises(ConfigError, match="a cache cannot know when it changes"):
        tutelage.distill(as_array, nn.Linear(4, 3), loader, cache=tmp_path / "c", out=tmp_path / "a", **options)
    forest = RandomForestClassifier(5, random_state=0).fit(X.numpy(), Y.numpy())
    other = RandomForestClassifier(6, random_state=0).fit(X.numpy(), Y.numpy())
    assert from_estimator(forest).digest not in (None, from_estimator(other).digest)
    tutelage.distill(forest, nn.Linear(4, 3), loader, cache=tmp_path / "c", out=tmp_path / "b", **options)
