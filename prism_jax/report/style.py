"""The style sheet of the report: light and dark, from phone to desktop, no file beside it."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1d2330; --soft: #5a6272; --edge: #dedbd4;
  --a: #2457c5; --b: #b4540a; --c: #0f7a4f;
  --good: #0f6b43; --good-back: #dcf3e6; --bad: #a1231c; --bad-back: #fbe4e1;
  --caption: #e3edff; --think: #fdefd9; --answer: #dcf5e6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171d; --card: #1c2028; --ink: #e7e9ee; --soft: #a2a9b8; --edge: #343a46;
    --a: #7ea6ff; --b: #f2a45c; --c: #5fd09a;
    --good: #7fdcae; --good-back: #173a2a; --bad: #ff9d94; --bad-back: #45201d;
    --caption: #1f2f52; --think: #44321b; --answer: #17402d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 6px; }
h2 { font-size: 1.2rem; margin: 40px 0 10px; }
h3 { font-size: 1rem; margin: 0; }
section > h3 { margin: 18px 0 6px; }
p { margin: 6px 0; }
.note { color: var(--soft); font-size: .9rem; max-width: 75ch; }
.warning {
  color: var(--bad); background: var(--bad-back); border-radius: 8px; padding: 8px 12px;
  max-width: 75ch; overflow-wrap: anywhere;
}
.card {
  background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: 14px;
  min-width: 0; margin: 0;
}
.tiles, .plots, .stages { display: grid; gap: 12px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); margin-top: 18px; }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
.stages { grid-template-columns: repeat(auto-fit, minmax(min(100%, 230px), 1fr)); }
.tile b {
  display: block; font-size: 1.8rem; line-height: 1.2; font-variant-numeric: tabular-nums;
}
.tile .name { font-weight: 600; }
.tile .note { display: block; }
.absent-value { color: var(--soft); font-weight: 400; white-space: nowrap; }
figcaption .note { display: block; margin-bottom: 8px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: .85rem; margin: 4px 0 6px; }
.legend span { display: inline-flex; align-items: center; gap: 6px; }
.legend svg { width: 26px; height: 10px; }
figure > svg { display: block; width: 100%; height: auto; }
svg text { font-size: 12px; fill: var(--soft); font-family: inherit; }
svg .strong, svg .value { fill: var(--ink); font-weight: 600; }
svg .value {
  font-size: 13px; paint-order: stroke; stroke: var(--card); stroke-width: 4px;
  stroke-linejoin: round;
}
svg .middle { text-anchor: middle; }
svg .end { text-anchor: end; }
svg .grid { stroke: var(--edge); stroke-width: 1; fill: none; }
svg .zero { stroke: var(--soft); stroke-width: 1; fill: none; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .raw { fill: none; stroke-width: 1; opacity: .3; stroke-linejoin: round; }
svg .line.a, svg .raw.a, svg .dot.a { stroke: var(--a); }
svg .line.b, svg .raw.b, svg .dot.b { stroke: var(--b); }
svg .line.c, svg .raw.c, svg .dot.c { stroke: var(--c); }
svg .line.b { stroke-dasharray: 7 4; }
svg .line.c { stroke-dasharray: 1.5 4.5; }
svg .dot { fill: var(--card); stroke-width: 1.5; }
svg .bar { opacity: .75; }
svg .bar.a { fill: var(--a); }
svg .bar.b { fill: var(--b); }
svg .bar.c { fill: var(--c); }
svg .whisker { stroke: var(--ink); stroke-width: 1.5; fill: none; }
svg .absent { fill: none; stroke: var(--soft); stroke-dasharray: 4 4; }
.scroll { overflow-x: auto; }
.scroll + .plots { margin-top: 12px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 7px 10px; border-bottom: 1px solid var(--edge); }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 500; font-size: .85rem; vertical-align: bottom; }
tbody tr:last-child > * { border-bottom: 0; }
td small { display: block; color: var(--soft); white-space: nowrap; }
.length { display: block; height: 8px; border-radius: 4px; background: var(--a); opacity: .75; }
td.wide { width: 45%; }
.tile, header, section > h3, p.note { overflow-wrap: anywhere; }
.wrapped td small { white-space: normal; overflow-wrap: anywhere; text-align: left; }
details summary { cursor: pointer; padding: 4px 0; }
pre {
  margin: 0; font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
.example { margin-bottom: 16px; }
.question { display: flex; flex-wrap: wrap; gap: 14px; align-items: center; margin-bottom: 14px; }
.question > div { flex: 1 1 200px; min-width: 0; overflow-wrap: anywhere; }
.question img {
  display: block; height: auto; max-width: 100%; border: 1px solid var(--edge);
  border-radius: 6px; image-rendering: pixelated;
}
.no-picture {
  border: 1px dashed var(--soft); border-radius: 6px; color: var(--soft); padding: 18px;
  flex: 0 1 160px; font-size: .85rem;
}
.response { border-top: 2px solid var(--edge); padding-top: 8px; min-width: 0; }
.response h4 {
  margin: 0 0 6px; display: flex; flex-wrap: wrap; gap: 8px; align-items: center;
  font-size: .95rem;
}
.response h4 .note { font-weight: 400; }
.response pre { max-height: 22em; overflow: auto; }
.verdict { font-size: .8rem; font-weight: 600; border-radius: 99px; padding: 1px 10px; }
.verdict.good { color: var(--good); background: var(--good-back); }
.verdict.bad { color: var(--bad); background: var(--bad-back); }
.caption, .think, .answer {
  border-radius: 3px; box-decoration-break: clone; -webkit-box-decoration-break: clone;
}
.caption { background: var(--caption); }
.think { background: var(--think); }
.answer { background: var(--answer); }
.key span { padding: 0 7px; }
:focus-visible { outline: 2px solid var(--a); outline-offset: 2px; }
@media (max-width: 520px) {
  main { padding: 16px 12px 48px; }
  .card { padding: 12px; }
  th, td { padding: 6px 6px; font-size: .9rem; }
  .response pre { max-height: 14em; }
}
@media print { .response pre { max-height: none; } }
"""
