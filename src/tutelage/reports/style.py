"""The page's style: one palette for light (and paper) and one for dark."""

from __future__ import annotations

LIGHT = """
  color-scheme: light;
  --page: #f6f7f9; --card: #ffffff; --ink: #1a2027; --quiet: #59636e; --rule: #dde2e8; --focus: #0b5cad;
  --teacher: #5b6672; --baseline: #bd5a00; --distilled: #0a66c2;
  --term1: #8a3ffc; --term2: #00857c; --term3: #b3246b; --term4: #6b7a00; --term5: #8c4a2f; --term6: #3d4fb8;
  --heat0: #fdf6ec; --heat1: #f6b873; --heat2: #cf4f46; --heat3: #4a1550;
"""

DARK = """
  color-scheme: dark;
  --page: #0f1317; --card: #181e24; --ink: #e8ecf0; --quiet: #9eabb8; --rule: #303943; --focus: #8cc2ff;
  --teacher: #b3bec9; --baseline: #f5a04c; --distilled: #62b0ff;
  --term1: #bf9bff; --term2: #3fcabf; --term3: #ff86bd; --term4: #c3d153; --term5: #e3a386; --term6: #9fadff;
  --heat0: #201a35; --heat1: #7a2a66; --heat2: #ea6a4b; --heat3: #ffe9a8;
"""

STYLE = (
    f":root {{{LIGHT}}}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{{DARK}}} }}\n"
    f":root.paper {{{LIGHT}}}\n"
    f"@media print {{ :root, :root.paper {{{LIGHT} --page: #ffffff; }} }}\n"
    """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 48px; }
h1, h2, h3, p { margin: 0; overflow-wrap: anywhere; }
h1 { font-size: 1rem; font-weight: 600; color: var(--quiet); overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 40px 0 4px; }
h3 { font-size: .95rem; overflow-wrap: anywhere; }
.verdict { font-size: clamp(1.2rem, 1rem + 1.3vw, 1.6rem); line-height: 1.35; font-weight: 600; margin: 8px 0 12px;
  text-wrap: balance; overflow-wrap: anywhere; }
.verdicts { margin: 12px 0; padding: 0; list-style: none; display: grid; gap: 12px; }
.verdicts li { border-left: 4px solid var(--distilled); padding-left: 12px; overflow-wrap: anywhere; }
.verdicts b { display: block; }
.note { color: var(--quiet); font-size: .875rem; max-width: 90ch; overflow-wrap: anywhere; }
.note + .note { margin-top: 4px; }
code, pre { font: .85em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 220px), 1fr)); gap: 12px;
  margin: 24px 0 0; }
.tiles > div, .panel, .scroll, details { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
.tiles > div { padding: 12px 16px; min-width: 0; }
.tiles dt { color: var(--quiet); font-size: .875rem; }
.tiles dd { margin: 0; }
.tiles .big { font-size: 1.5rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px;
  margin-top: 12px; align-items: start; }
.side { grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
.side .panel:only-child { max-width: 620px; }
.panel { margin: 12px 0 0; padding: 12px 12px 8px; min-width: 0; }
.panels .panel { margin: 0; }
.panel h2 { margin: 0 4px 2px; font-size: 1.05rem; }
.panel h3, .panel .note { margin: 0 4px 4px; }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 12px; }
.maps > div { min-width: 0; }
.finding { margin: 12px 4px 0; max-width: 90ch; }
.pairs { border: 0; margin: 4px 0 0; max-width: 640px; }
.narrow { max-width: 640px; }
.narrow:not(.words) th:first-child { min-width: 8.5em; }
section > .finding { margin-inline: 0; }
.pairs thead th, .pairs th:first-child { min-width: 0; }
.pairs th, .pairs td { padding-block: 6px; }
.rank { display: inline-block; min-width: 3ch; color: var(--quiet); }
.plot { width: 100%; min-width: 0; overflow: hidden; }
.tall { max-height: 720px; overflow-y: auto; }
.controls { display: flex; flex-wrap: wrap; gap: 8px 16px; margin: 4px; font-size: .875rem; align-items: center; }
.controls label { display: inline-flex; gap: 6px; align-items: center; max-width: 100%; }
.controls fieldset { border: 0; padding: 0; margin: 0; display: flex; flex-wrap: wrap; gap: 12px; }
.controls legend { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
select { font: inherit; color: inherit; background: var(--page); border: 1px solid var(--quiet); border-radius: 6px;
  padding: 4px 6px; max-width: 100%; min-width: 0; text-overflow: ellipsis; }
input { accent-color: var(--distilled); margin: 0; width: 16px; height: 16px; }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; border-radius: 4px; }
.scroll { overflow-x: auto; margin: 12px 0 8px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th:first-child { padding-left: 12px; }
th:last-child, td:last-child { padding-right: 12px; }
caption { text-align: left; padding: 10px 12px 2px; font-weight: 600; font-size: 1.05rem; overflow-wrap: anywhere; }
th, td { padding: 9px; text-align: right; white-space: nowrap; vertical-align: bottom;
  border-bottom: 1px solid var(--rule); }
thead th { font-weight: 500; color: var(--quiet); font-size: .8125rem; white-space: normal; min-width: 6em; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--card); white-space: normal;
  min-width: 10em; max-width: 16em; overflow-wrap: anywhere; }
tbody tr:last-child > * { border-bottom: 0; }
.results tbody tr:has(.distilled) { font-weight: 650; }
.results { margin-top: 24px; }
.role { white-space: nowrap; }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 4px; font-size: .8125rem; }
.words th { text-align: left; }
.words td { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 8em; }
.explorer { padding: 12px 16px; }
.pick { display: grid; grid-template-columns: minmax(0, 1fr); gap: 16px; margin-top: 8px; }
@media (min-width: 900px) { .pick { grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); } }
.cards { border: 0; margin: 0; padding: 3px; min-width: 0; display: grid; gap: 8px; align-content: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 210px), 1fr)); max-height: 640px; overflow-y: auto; }
.cards legend, .hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.card { position: relative; display: flex; gap: 10px; align-items: center; padding: 6px 8px; min-width: 0;
  border: 1px solid var(--rule); border-left-width: 4px; border-radius: 6px; cursor: pointer; font-size: .8125rem; }
.card.apart { border-left-color: var(--distilled); }
.card input { position: absolute; opacity: 0; inset: 0; width: 100%; height: 100%; cursor: pointer; }
.card:has(:checked) { background: var(--page); box-shadow: 0 0 0 2px var(--distilled); }
.card:has(:focus-visible) { outline: 3px solid var(--focus); outline-offset: 2px; }
.card img, .sample img { image-rendering: pixelated; background: #000; border-radius: 4px; flex: none;
  object-fit: contain; }
.lines { display: grid; min-width: 0; overflow-wrap: anywhere; line-height: 1.35; }
.lines q { color: var(--quiet); quotes: none; }
.lines .swatch { width: 8px; height: 8px; margin-right: 5px; }
.right { color: var(--quiet); font-weight: 400; }
.wrong { color: var(--baseline); font-weight: 600; }
.shown { min-width: 0; }
.sample { display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: end; min-height: 40px; }
.sample blockquote { margin: 0; padding-left: 12px; border-left: 4px solid var(--rule); white-space: pre-wrap;
  max-height: 220px; overflow-y: auto; flex-basis: 100%; overflow-wrap: anywhere; }
.temperature { display: flex; flex-wrap: wrap; gap: 8px 12px; align-items: center; margin: 12px 0 0; }
.temperature label { font-weight: 650; }
.temperature input { flex: 1 1 160px; min-width: 0; height: 24px; }
.temperature output { min-width: 6ch; font-weight: 650; font-variant-numeric: tabular-nums; }
.temperature button { font: inherit; font-size: .875rem; color: inherit; background: var(--page); cursor: pointer;
  border: 1px solid var(--quiet); border-radius: 6px; padding: 3px 10px; }
.shown .scroll { border: 0; margin: 8px 0 4px; }
.soft th, .soft td { padding: 4px 8px; vertical-align: middle; }
.soft { table-layout: fixed; }
.soft thead th { min-width: 0; }
.soft .role { white-space: normal; }
.soft thead th:not(:first-child), .soft td { text-align: left; }
.soft th:first-child { min-width: 0; padding-left: 4px; }
.soft td { white-space: normal; }
.track { display: block; height: 10px; background: var(--page); border-radius: 3px; overflow: hidden; }
.bar { display: block; height: 100%; border-radius: 3px; min-width: 1px; print-color-adjust: exact; }
.bar.teacher { background: var(--teacher); }
.bar.baseline { background: var(--baseline); }
.bar.distilled { background: var(--distilled); }
.share { font-size: .75rem; color: var(--quiet); font-variant-numeric: tabular-nums; }
.asked { padding: 12px 16px; }
.asked .prompt { white-space: pre-wrap; font-weight: 600; max-width: 90ch; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr)); gap: 8px 20px;
  margin-top: 10px; }
.answers > div { min-width: 0; }
.asked h4 { margin: 0 0 2px; font-size: .8125rem; font-weight: 600; color: var(--quiet); overflow-wrap: anywhere; }
.asked .said { white-space: pre-wrap; font-size: .9rem; }
.asked ul { margin: 10px 0 0; padding-left: 18px; }
.won { margin-left: 6px; padding: 1px 7px; border-radius: 9px; background: var(--distilled); color: var(--card); }
.swatch { display: inline-block; width: 11px; height: 11px; margin-right: 8px; border-radius: 3px; }
.swatch.teacher { background: var(--teacher); transform: rotate(45deg) scale(.85); border-radius: 0; }
.swatch.other { background: none; border: 2px solid var(--quiet); }
.swatch.baseline { background: var(--baseline); }
.swatch.distilled { background: var(--distilled); border-radius: 50%; }
details { margin-top: 12px; padding: 10px 16px; min-width: 0; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
details pre { overflow-x: auto; margin: 10px 0 4px; }
footer { margin-top: 32px; color: var(--quiet); font-size: .875rem; }
@media (max-width: 640px) {
  main { padding: 20px 12px 32px; }
  .panel { padding: 10px 4px 4px; }
  .asked, .explorer { padding: 10px; }
  .cards { max-height: 330px; }
  .soft th, .soft td { padding: 4px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; }
  .tiles > div { padding: 10px 12px; }
  .tiles .big { font-size: 1.2rem; }
  th, td { padding: 8px 9px; }
  th:first-child { min-width: 7em; max-width: 11em; }
  .results th:first-child { max-width: none; }
  .words th:first-child { min-width: 9.5em; }
}
@media print {
  @page { size: A4; margin: 14mm; }
  body { font-size: 11pt; }
  main { max-width: none; padding: 0; }
  .panel, .tiles > div, tr, .verdicts li, .answers > div { break-inside: avoid; }
  h2, h3, caption { break-after: avoid; }
  .panels { display: block; }
  .panels .panel { margin-bottom: 12px; }
  .maps { grid-template-columns: 1fr 1fr; }
  .panel:has(.tall), .panel.dark { break-inside: auto; }
  .tall { max-height: none; overflow: visible; }
  .explorer { break-inside: auto; }
  .pick { display: block; }
  .cards { max-height: none; overflow: visible; grid-template-columns: repeat(4, 1fr); margin-bottom: 12px; }
  .card { break-inside: avoid; }
  .card:nth-of-type(n+13), .temperature button { display: none; }
  .scroll { overflow: visible; }
  th, td { padding: 4px 5px; font-size: 7.5pt; }
  thead th, th:first-child { min-width: 0; font-size: 7.5pt; }
  .verdict { font-size: 15pt; }
  .tiles { grid-template-columns: repeat(4, 1fr); gap: 8px; margin-top: 12px; }
  .tiles > div { padding: 6px 8px; }
  .tiles .big { font-size: 12pt; }
  .note, .tiles dt { font-size: 8.5pt; }
  .modebar-container { display: none; }
}
"""
)
