"""A small recipe, what it needs, and many ways to break both. Used by tests/experiment/bad_input."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tutelage.models import ModelSpec, build, save_model

RECIPE = """\
name: small
data:
  source: digits
  limit: 200
teacher: {model: mlp, checkpoint: teacher}
student:
  model: mlp
  options: {hidden: [4]}
method: {kind: logit, temperature: 2, alpha: 0.5}
train:
  steps: 2
  batch_size: 50
  optimizer: {kind: sgd, lr: 0.1}
"""

DIGITS = [str(i) for i in range(10)]
SPEC = ModelSpec("mlp", {}, classes=10, channels=1, size=8)


def taught() -> nn.Module:
    """A teacher that knows the digits a little."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float().div(16).view(-1, 1, 8, 8), torch.from_numpy(labels).long()
    x = (x - x.mean()) / x.std()
    torch.manual_seed(0)
    model = build(SPEC)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def save_teacher(model: nn.Module, folder: Path, classes: list[str] | None = None) -> None:
    save_model(model, folder, {"spec": SPEC.to_dict(), "classes": classes or DIGITS})


def snapshot(folder: Path) -> dict[str, str]:
    """Every path under ``folder``, and the hash of each file."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in sorted(folder.rglob("*"))
        if "__pycache__" not in p.parts
    }


# Images ----------------------------------------------------------------------------------------------


def images(folder: Path, classes: dict[str, int], split: str = "train") -> None:
    from PIL import Image

    for label, (name, count) in enumerate(classes.items()):
        (folder / split / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (40 * label, 10 * i, 90)).save(folder / split / name / f"{i}.png")


# Weights ---------------------------------------------------------------------------------------------


class Trap:
    """Unpickling it leaves a file behind."""

    def __reduce__(self) -> Any:
        return os.system, ("touch owned",)


def pickled_with_code(path: Path) -> None:
    torch.save({"head.weight": Trap()}, path)


def plain_pickle_with_code(path: Path) -> None:
    path.write_bytes(pickle.dumps(Trap()))


def truncated(path: Path) -> None:
    save_file(build(SPEC).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])


def truncated_torch(path: Path) -> None:
    torch.save(build(SPEC).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])


def other_architecture(path: Path) -> None:
    save_file(build(ModelSpec("convnet", {"widths": [4]}, classes=10, channels=1, size=8)).state_dict(), path)


def five_classes(path: Path) -> None:
    save_file(build(ModelSpec("mlp", {}, classes=5, channels=1, size=8)).state_dict(), path)


def nan_weights(path: Path) -> None:
    state = build(SPEC).state_dict()
    state["head.bias"][3] = float("nan")
    save_file(state, path)


def optimizer_state(path: Path) -> None:
    torch.save({"epoch": 3, "loss": 0.1}, path)


def edit_card(path: Path, **changes: Any) -> None:
    card = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**card, **changes}), encoding="utf-8")


# Models that a recipe can name as support.bad_input_files:NAME


def no_module(classes: int) -> Any:
    return classes


def five_whatever() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))


def for_bigger_images(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, classes))


def no_tensor(classes: int) -> nn.Module:
    class Words(nn.Module):
        def forward(self, x: torch.Tensor) -> str:
            return "a picture of a cat"

    return Words()


not_callable = 3
