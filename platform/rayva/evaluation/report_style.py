"""The report's style sheet: light and dark, wide and narrow, no outside assets."""

CSS = """
:root { color-scheme: light dark; --bg: #fbfbfa; --card: #fff; --ink: #1d1f23; --soft: #676c75;
  --line: #e4e4e1; --accent: #2457a6; --raw: #b9cbe8; --good: #14803c; --bad: #b42318;
  --good-bg: #e8f5ec; --bad-bg: #fdecea; --track: #eceeef; --warm: #c98a1b; }
@media (prefers-color-scheme: dark) { :root { --bg: #14161a; --card: #1c1f25; --ink: #e8e9ec;
  --soft: #9aa0ab; --line: #2d3139; --accent: #7fb0ff; --raw: #34507e; --good: #5fd08a; --bad: #ff8f84;
  --good-bg: #16301f; --bad-bg: #3a1d1b; --track: #2a2e36; --warm: #e2b04a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; letter-spacing: -0.01em; margin: 3rem 0 .25rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0 1rem; }
.soft, figcaption { color: var(--soft); }
.small { font-size: .875rem; }
code, pre { font: .875rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .75rem 1rem;
  overflow-x: auto; }
td pre { white-space: pre-wrap; margin: 0; min-width: 16rem; }
h1, h2, h3, p, .bars, .card, td pre { overflow-wrap: anywhere; }
td { overflow-wrap: break-word; }
.verdict { border-radius: 12px; padding: 1rem 1.25rem; margin: 1.5rem 0; }
.verdict strong { display: block; font-size: 1.125rem; }
.verdict.yes { background: var(--good-bg); } .verdict.yes strong { color: var(--good); }
.verdict.no { background: var(--bad-bg); } .verdict.no strong { color: var(--bad); }
.bars { display: grid; grid-template-columns: fit-content(45%) minmax(4rem, 1fr) max-content;
  gap: .6rem 1rem; align-items: center; }
.bar { position: relative; height: 1.4rem; background: var(--track); border-radius: 6px; }
.bar i { position: absolute; inset: 0 auto 0 0; border-radius: 6px; background: var(--accent); }
.bar.other i { background: var(--warm); }
.bar b { position: absolute; top: 30%; bottom: 30%; border: solid var(--ink); border-width: 0 2px;
  background: linear-gradient(var(--ink), var(--ink)) center / 100% 1px no-repeat; opacity: .65; }
.num { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .8125rem; }
th, td { padding: .45rem .75rem .45rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th.num { text-align: right; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1.25rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem;
  margin: 0; min-width: 0; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--line); } polyline { fill: none; stroke-linejoin: round; }
.raw { stroke: var(--raw); stroke-width: 1; } .smooth { stroke: var(--accent); stroke-width: 2.2; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(17.5rem, 1fr)); gap: 1rem; }
.shown { display: flex; gap: .75rem; align-items: flex-end; margin-bottom: .75rem; }
.shown img { border-radius: 8px; border: 1px solid var(--line); max-width: 100%; }
.shown .main { width: 9.5rem; } .shown .wrong { width: 4.5rem; opacity: .85; }
.shown figure { margin: 0; } figcaption { font-size: .75rem; line-height: 1.3; margin-top: .2rem; }
.question { font-weight: 600; line-height: 1.4; margin: 0 0 .25rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .75rem; margin: .5rem 0 0;
  font-size: .9375rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.yes-mark { color: var(--good); } .no-mark { color: var(--bad); }
@media (max-width: 34rem) { .bars { grid-template-columns: 1fr max-content; }
  .bars > :nth-child(3n+1) { grid-column: 1 / -1; margin-bottom: -.4rem; } main { padding-top: 1.5rem; } }
@media print { .card { break-inside: avoid; } }
"""
