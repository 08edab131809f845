"""``tutelage taps``: what it prints can be written into a recipe as it stands, and a mistake is one message."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support import bad_input_files as broken
from support.numbered import Halves, hooks
from support.worlds import WORLDS
from tutelage.cli.taps_survey import survey, survey_model
from tutelage.data import Batch
from tutelage.models import ModelSpec, build, save_model
from tutelage.taps import Needs, observe

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    from tutelage.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(broken.RECIPE)
    broken.save_teacher(build(broken.SPEC), tmp_path / "teacher")

    def call(*args: str) -> tuple[int, str, str]:
        code = 0
        try:
            main(["taps", *args])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


class Strange(nn.Module):
    """Runs a module twice and one not at all; gives tuples and dictionaries; ends without logits."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.twice, self.unused, self.halves = nn.Conv2d(channels, channels, 1), nn.Linear(2, 2), Halves()
        self.grows = nn.Flatten()

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.twice(self.twice(x))
        pair = self.halves(x)
        return {"small": pair.half, "deep": (self.grows(x), [self.grows(x[:, :1])], None)}


def test_a_tree_of_shapes_and_what_auto_would_take(command: Command) -> None:
    code, out, _ = command("resnet", "--shape", "1x16x16", "-o", "widths=[4, 8]", "-o", "blocks=2", "--classes", "7")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "resnet  on [B, 1, 16, 16]"
    assert lines[1].startswith("(the model)  ResNet  [B, 7]")
    assert any("1  Sequential  [B, 8, 8, 8]" in line and line.endswith("auto 8x8") for line in lines)
    assert "pairs: auto would take stages.0 (16x16), stages.1 (8x8)" in lines
    short = command("resnet", "--shape", "1x16x16", "--depth", "1")[1].splitlines()
    assert any("stages" in line and "+" in line and "inside" in line for line in short)
    assert not any("BasicBlock" in line for line in short)


def test_calls_items_and_modules_that_did_not_run(command: Command) -> None:
    code, out, _ = command(f"{__name__}:Strange", "--shape", "3x4x4")
    assert code == 0
    for line in ("[small]  [B, 3, 4, 4]", "[deep][0]  [B, 48]", "[deep][1][0]  [B, 16]", "[deep][2]  None",
                 "Conv2d  x2  12", "@0 to @1  [B, 3, 4, 4]", "@0  [B, 48]", "@1  [B, 16]", "[half]  [B, 3, 4, 4]",
                 "unused  Linear  6  did not run"):  # fmt: skip
        assert line in out, f"{line!r} not in\n{out}"


def test_every_tap_that_is_listed_can_be_tapped() -> None:
    example = Batch(torch.zeros(3, 3, 4, 4), torch.zeros(3, dtype=torch.long))
    models: list[tuple[nn.Module, Batch]] = [(Strange(), example)]
    for name in ("cnn", "bert", "llama"):
        world = WORLDS[name]()
        models.append((world.make(8), world.to_batch(world.held[0]).rows(0, 3)))
    for model, batch in models:
        found = survey(model, batch, "model")
        wanted = {
            node.path + key.replace("@0 to ", ""): text
            for node in found.nodes for key, text in node.outputs if text.startswith("[")
        }  # fmt: skip
        seen = observe(model.eval(), batch.inputs, Needs(logits=False, hidden=tuple(wanted))).hidden
        for tap, text in wanted.items():
            assert text == f"[B, {', '.join(map(str, seen[tap].shape[1:]))}]" or seen[tap].shape[0] != 3, tap
        assert hooks(model) == 0


def test_a_recipe_shows_both_models_on_its_data(command: Command) -> None:
    code, out, _ = command("recipe.yaml")
    assert code == 0
    assert "student: mlp  on [B, 1, 8, 8] (digits)" in out
    assert "teacher: mlp  on [B, 1, 8, 8] (digits)" in out
    assert "pairs: auto would find no resolution in both" in out
    code, out, _ = command("recipe.yaml", "--of", "student", "-o", "student.options.hidden=[3]")
    assert code == 0
    assert "Linear  [B, 3]" in out
    assert "teacher" not in out


def test_a_folder_that_a_run_exported(command: Command, tmp_path: Path) -> None:
    spec = ModelSpec("convnet", {"widths": [4]}, 5, 1, 12)
    save_model(build(spec), tmp_path / "student", {"spec": spec.to_dict()})
    code, out, _ = command("student")
    assert code == 0
    assert "on [B, 1, 12, 12] (its own size; --shape gives another)" in out
    assert "[B, 5]" in out


def test_libraries_and_texts_have_shapes_of_their_own(tmp_path: Path) -> None:
    assert survey_model("timm:resnet10t").inputs.startswith("[B, 3, 176, 176] (its own size")
    assert survey_model("torchvision:squeezenet1_1").inputs.startswith("[B, 3, 224, 224] (the default")
    assert survey_model("resnet").inputs.startswith("[B, 3, 32, 32] (the default")
    save_model(WORLDS["bert"]().make(8), tmp_path / "bert", {"class": "BertForSequenceClassification", "spec": None})
    found = survey_model(str(tmp_path / "bert"), size=(7,))
    assert found.inputs == "input_ids [B, 7]"
    assert ("[last_hidden_state]", "[B, 7, 8]") in next(n for n in found.nodes if n.path == "bert").outputs


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["resnett"], ["unknown model 'resnett'", "did you mean 'resnet'"]),
        (["timm:resnet1888"], ["timm has no model", "nearest"]),
        (["resnet", "-o", "blcks=2"], ["blcks", "options of resnet: blocks"]),
        (["resnet", "-o", "blocks"], ["-o blocks", "not of the form key=value"]),
        (["resnet", "-o", "blocks={"], ["-o blocks={", "not YAML"]),
        (["resnet", "--shape", "3x"], ["--shape 3x", "3x64x64"]),
        (["resnet", "--shape", "0x8x8"], ["--shape 0x8x8", "3x64x64"]),
        (["resnet", "--shape", "5"], ["resnet: does not take [B, 5]", "--shape 3x64x64"]),
        (["timm:resnet18", "--shape", "3x0x8"], ["--shape 3x0x8"]),
        (["resnet", "--of", "student"], ["--of student needs a recipe"]),
        (["recipe.yaml", "--of", "pupil"], ["--of pupil", "student, teacher"]),
        (["recipe.yaml", "--shape", "1x8x8"], ["--shape is for models"]),
        (["recipe.yaml", "-o", "student.modle=mlp"], ["student.modle", "did you mean 'model'"]),
        (["recipe2.yaml"], ["recipe2.yaml: no such recipe", "recipe.yaml"]),
        (["runs/nowhere/student"], ["runs/nowhere/student: no such folder"]),
        (["."], ["has no model.json", "a folder that a run exported"]),
        (["teacher", "-o", "depth=3"], ["-o cannot change", "teacher"]),
        (["no.such.package:Model"], ["no module"]),
    ],
)
def test_a_mistake_is_one_message_with_a_remedy(command: Command, args: list[str], says: list[str]) -> None:
    code, out, err = command(*args)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith("tutelage: ")
    assert "\n  -> " in err
    assert [part for part in says if part not in err] == []


def test_a_mistake_of_the_command_line_is_answered_without_torch() -> None:
    code = (
        "import sys\nfrom tutelage.cli import main\n"
        "for args in (['resnet', '--shape', 'x'], ['resnet', '-o', 'x'], ['missing.yaml'], ['mlp', '--of', 'x']):\n"
        "    try:\n        main(['taps', *args])\n    except SystemExit as stop:\n        assert stop.code == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
