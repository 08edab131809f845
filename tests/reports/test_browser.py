"""The page in a real browser: quiet, self-contained, never wider than the window, in the scheme of the reader."""

from __future__ import annotations

import functools
import html
import json
import re
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from support.fake_runs import CLASSES, CONFIG, make_judged, make_run, make_samples, make_summary, make_written
from tutelage.reports import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (1280, 390)
HOSTILE = "</script><script>document.title='taken'</script>"

# Loads each page in frames of both widths, waits until it is drawn, and writes what it measured as its text.
WRAPPER = """<!DOCTYPE html><meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<style>iframe { border: 0; height: 900px; color-scheme: light dark; }</style><body><script>
const found = [], jobs = JOBS;
async function measure([page, width]) {
  const frame = document.createElement("iframe");
  frame.style.width = width + "px";
  frame.src = page;
  document.body.append(frame);
  await new Promise((done) => frame.addEventListener("load", done));
  const view = frame.contentWindow, doc = frame.contentDocument, root = doc.documentElement;
  for (let i = 0; i < 200 && !root.classList.contains("drawn"); i++) await new Promise((r) => setTimeout(r, 50));
  const raw = doc.querySelector("input[value=raw]"), loss = raw.closest("figure").querySelector(".plot");
  const before = loss.data.map((trace) => trace.name);
  raw.click();
  const dark = doc.querySelector("figure.similarity"), maps = [...dark.querySelectorAll(".plot")];
  const seen = () => maps.map((m) => m.data.map((trace) => [trace.zmin, trace.zmax, trace.hovertemplate]));
  const parts = [...dark.querySelectorAll("[data-when]")];
  const shown = () => parts.filter((part) => part.offsetHeight).map((part) => part.dataset.when);
  const preset = [seen(), shown()];
  dark.querySelector("input[value='20']").click();
  const softer = [seen(), shown()];
  dark.querySelector("input[value=own]").click();
  const own = [seen(), shown()];
  const explorer = doc.querySelector("form.explorer"), slider = explorer.querySelector("input[type=range]");
  const bars = (part) => [...part.querySelectorAll(".bar")];
  const shares = () => [...explorer.querySelectorAll("tbody tr")].map((line) =>
    [line.querySelector("th").textContent, ...bars(line).map((bar) => parseFloat(bar.style.width))]);
  const widest = () => Math.max(...bars(explorer).map((bar) => bar.getBoundingClientRect().width));
  const output = explorer.querySelector("output");
  const at = () => [output.textContent, slider.getAttribute("aria-valuetext"), shares(), widest()];
  const soft = [at()];
  for (const place of ["0", "100"]) {
    slider.value = place;
    slider.dispatchEvent(new Event("input", { bubbles: true }));
    soft.push(at());
  }
  explorer.querySelector("[data-set='1']").click();
  soft.push(at());
  const cards = [...explorer.querySelectorAll(".card input")];
  cards[7].click();
  const large = explorer.querySelector(".sample");
  const picked = [at(), large.textContent, large.querySelectorAll("img").length];
  const reached = [slider, ...cards, ...explorer.querySelectorAll("button"), ...doc.querySelectorAll("summary")]
    .filter((one) => { one.focus({ preventScroll: true }); return doc.activeElement !== one; }).length;
  found.push({
    page, width, drawn: root.classList.contains("drawn"), title: doc.title, inner: view.innerWidth,
    scroll: root.scrollWidth, background: view.getComputedStyle(doc.body).backgroundColor,
    plots: doc.querySelectorAll(".plot").length, svgs: doc.querySelectorAll("[data-figure] svg").length,
    resources: view.performance.getEntriesByType("resource").map((e) => e.name).filter((n) => !n.startsWith("data:")),
    wide: [...doc.querySelectorAll(".plot")].filter((p) => p.scrollWidth > p.clientWidth).length,
    soft, picked, unreached: reached, answers: doc.querySelectorAll("article.prompt-panel").length,
    images: [...doc.images].filter((image) => !image.complete || !image.naturalWidth).length,
    preset, softer, own, side: new Set(maps.map((m) => m.getBoundingClientRect().top)).size,
    ink: doc.querySelector(".plot text").style.fill, before, after: loss.data.map((trace) => trace.name),
  });
  frame.remove();
}
(async () => {
  for (const job of jobs) await measure(job);
  document.body.textContent = JSON.stringify(found);
})();
</script>"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with two pages and the wrapper, served."""
    folder = tmp_path_factory.mktemp("site")
    plain = make_run(folder / "digits")
    names = [HOSTILE, "<img src=x onerror=\"document.title='taken'\">", "a very long name " * 9, *CLASSES[3:]]
    hostile = make_summary(classes=names, name=HOSTILE, seeds=1, baseline=None)
    hostile["formula"] = "x" * 300 + HOSTILE
    other = make_run(
        folder / ("long-name" * 12), hostile, config=f"# {'y' * 400}{HOSTILE}\n{CONFIG}".replace("4.0", "8.0")
    )
    make_samples(plain, make_summary())
    make_samples(other, hostile, texts=True)
    for run, said in ((plain, "It is 3."), (other, HOSTILE)):
        make_written(run, said)
        make_judged(run / "judged" / "a.json", said)
    write_report([plain], folder / "one.html")
    write_report([plain, other], folder / "two.html")
    jobs = json.dumps([[page, width] for page in ("one.html", "two.html") for width in WIDTHS])
    (folder / "wrapper.html").write_text(WRAPPER.replace("JOBS", jobs), encoding="utf-8")
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def moved(states):
    """What the slider did: as taught, at its lowest, at its highest, and back at T = 1 by the button."""
    assert [state[0] for state in states] == ["T = 4", "T = 0.25", "T = 20", "T = 1"]
    assert all(state[0] == state[1] for state in states)
    rows = [state[2] for state in states]
    assert len({tuple(row[0] for row in lines) for lines in rows}) == 1, "classes stay where they are"
    for lines in rows:
        for model in (1, 2, 3):
            assert sum(row[model] for row in lines) == pytest.approx(100, abs=0.1)
    taught, cold, hot, plain = (max(row[1] for row in lines) for lines in rows)
    assert cold > plain > taught > hot > 100 / len(CLASSES)
    assert hot < 20
    assert states[1][3] > states[2][3] > 0, "the bars are drawn, and as wide as the shares"


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_the_page_in_a_browser(site, scheme, tmp_path):
    number = {"dark": 0, "light": 1}[scheme]
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--no-first-run",
            f"--user-data-dir={tmp_path}", f"--blink-settings=preferredColorScheme={number}",
            "--enable-logging=stderr", "--window-size=1400,1000", "--virtual-time-budget=60000", "--dump-dom",
            f"{site}/wrapper.html",
        ],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []
    body = re.search(r"<body>(\[.*\])\s*</body>", done.stdout, flags=re.DOTALL)
    assert body is not None, done.stdout[-2000:]
    found = json.loads(html.unescape(body[1]))
    assert [(f["page"], f["width"]) for f in found] == [(p, w) for p in ("one.html", "two.html") for w in WIDTHS]
    for f in found:
        assert f["drawn"]
        assert f["title"].endswith("distillation report")
        assert f["inner"] == f["width"]
        assert f["scroll"] <= f["inner"]
        assert f["wide"] == 0
        assert f["svgs"] >= f["plots"] >= 5
        assert f["resources"] == []
        assert f["background"] == ("rgb(15, 19, 23)" if scheme == "dark" else "rgb(246, 247, 249)")
        assert f["ink"] == ("rgb(232, 236, 240)" if scheme == "dark" else "rgb(26, 32, 39)")
        assert f["before"] == ["kd", "ce", "loss (their sum)"]
        assert f["after"] == ["kd", "ce"]
        assert f["side"] == (1 if f["width"] == 1280 else 3)
        assert f["images"] == f["unreached"] == 0
        assert f["answers"] == 21 * (1 if f["page"] == "one.html" else 2)
        moved(f["soft"])
        assert f["picked"][0][2] != f["soft"][3][2], "another sample, other distributions"
        assert "sample 7, agree" in f["picked"][1]
        assert f["picked"][2] == 1
        for state, t in (("preset", "4"), ("softer", "20"), ("own", "20")):
            maps, shown = f[state]
            assert shown == [f"T={t}"]
            assert [len(traces) for traces in maps] == [1, 1, 1]
            assert all(f"T = {t}<" in traces[0][2] for traces in maps)
            assert len({tuple(traces[0][:2]) for traces in maps}) == (2 if state == "own" else 1)
