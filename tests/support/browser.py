"""Pages as a browser draws them, at the width of a desk and of a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "</script><script>document.title='taken'</script>"
INK = {"dark": "rgb(232, 236, 240)", "light": "rgb(26, 32, 39)"}

WRAPPER = """<!DOCTYPE html><meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<style>iframe { border: 0; height: 900px; color-scheme: light dark; }</style><body><script>
const found = [];
(async () => {
  for (const page of PAGES) for (const width of [1280, 390]) {
    const frame = document.createElement("iframe");
    frame.style.width = width + "px";
    frame.src = page;
    document.body.append(frame);
    await new Promise((done) => frame.addEventListener("load", done));
    const doc = frame.contentDocument, root = doc.documentElement;
    for (let i = 0; i < 200 && !root.classList.contains("drawn"); i++) await new Promise((r) => setTimeout(r, 50));
    const plots = [...doc.querySelectorAll(".plot")];
    const boxes = (p) => [...p.querySelectorAll(".xtick text")].map((t) => t.getBoundingClientRect());
    const meet = (a, b) =>
      a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
    found.push({
      page, width, drawn: root.classList.contains("drawn"), title: doc.title, scroll: root.scrollWidth,
      plots: plots.map((p) => p.data.map((t) => t.name)), ink: doc.querySelector(".plot text").style.fill,
      wide: plots.filter((p) => p.scrollWidth > p.clientWidth).length,
      overlaps: plots.filter((p) => boxes(p).some((a, i) => boxes(p).slice(i + 1).some((b) => meet(a, b)))).length,
    });
    frame.remove();
  }
  document.body.textContent = JSON.stringify(found);
})();
</script>"""


def looked_at(folder: Path, pages: list[str], scheme: str) -> list[dict[str, Any]]:
    """What a browser measures of each page in ``folder`` at both widths; a console message fails."""
    assert BROWSER is not None
    (folder / "wrapper.html").write_text(WRAPPER.replace("PAGES", json.dumps(pages)), encoding="utf-8")
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--no-first-run", "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}",
            f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}", "--enable-logging=stderr",
            "--window-size=1400,1000", "--virtual-time-budget=60000", "--dump-dom", f"file://{folder}/wrapper.html",
        ],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []
    body = re.search(r"<body>(\[.*\])\s*</body>", done.stdout, flags=re.DOTALL)
    assert body is not None, done.stdout[-2000:]
    found: list[dict[str, Any]] = json.loads(html.unescape(body[1]))
    for f in found:
        assert f["drawn"]
        assert f["scroll"] <= f["width"], f
        assert f["wide"] == f["overlaps"] == 0, f
        assert f["ink"] == INK[scheme]
    return found
