"""The page's style sheet: system fonts, light and dark by the reader's own setting."""

CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --back: #ffffff; --card: #f6f8fa;
  --good: #0072b2; --bad: #b84a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #f0f6fc; --soft: #9198a1; --line: #3d444d; --back: #0d1117;
  --card: #151b23; --good: #56b4e9; --bad: #f0883e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; margin-bottom: 1.5rem; }
.card { flex: 1 1 12rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem 1rem; }
.card .value { font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.card .label { color: var(--soft); }
.card.good .value { color: var(--good); }
.card.bad .value { color: var(--bad); }
figure { margin: 0 0 1rem; }
img { display: block; width: 100%; height: auto; border-radius: 8px; background: #ffffff; }
.thumbnails { display: flex; flex-wrap: wrap; gap: .75rem; }
.thumbnails figure { margin: 0; text-align: center; color: var(--soft); font-size: .85rem; }
.thumbnails img { width: 6rem; border-radius: 4px; image-rendering: pixelated; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; color: var(--soft); }
th:first-child, td:first-child { text-align: left; }
thead th { vertical-align: bottom; }
.columns { columns: 26rem 2; column-gap: 2rem; }
.columns section { break-inside: avoid; }
.columns h2 { padding-top: 2rem; margin-top: 0; }
.pairs th { font-weight: 400; white-space: nowrap; }
.pairs td { text-align: left; overflow-wrap: anywhere; }
details { margin-top: 2rem; color: var(--soft); }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem;
  font: 12px/1.45 ui-monospace, monospace; }
"""
