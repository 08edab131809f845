"""The command tutelage cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.cache_cases import network
from tutelage.cli import main


def test_the_command_fills_checks_describes_and_joins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    save_file(network().state_dict(), "teacher.safetensors")
    (tmp_path / "r.yaml").write_text(
        "data: {source: digits, limit: 100, augment: [{shift: 1}], views: 2}\n"
        "teacher: {model: convnet, options: {widths: [4, 8], depth: 1}, checkpoint: teacher.safetensors}\n"
        "student: {model: convnet, options: {widths: [4, 8], depth: 1}}\n"
        "method: {kind: feature, loss: similarity}\ntrain: {steps: 4, batch_size: 32}\n"
    )
    with pytest.raises(SystemExit) as stop:
        main(["cache", "r.yaml"])
    assert not stop.value.code
    assert "200 rows, 200 of them computed now" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["cache", "r.yaml"])
    out = capsys.readouterr().out
    assert "200 rows, 0 of them computed now" in out
    folder = out.split(":")[0]
    assert folder.startswith("runs/cache/r-")
    for action, says in (("verify", "intact; 200 rows"), ("info", "samples: 100"), ("compact", "1 shards")):
        with pytest.raises(SystemExit):
            main(["cache", action, folder])
        assert says in capsys.readouterr().out
    side = next(Path(folder).glob("shard-*.json"))
    side.write_text(side.read_text().replace('"rows": ', '"rows":  '))
    for words, says in (
        (["cache", "verify", folder], "1 faults"),
        (["cache", "verify"], "takes one folder"),
        (["cache", "info", "nowhere"], "no such file"),
        (["cache", "r.yaml", "data.views=null"], "data.views=10"),
        (["cache", "r.yaml", "teacher.checkpoint=null"], "no weights yet"),
        (["cache", "r.yaml", "teacher.cache={keep: topk, k: 0}"], "teacher.cache.k"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert says in capsys.readouterr().err
