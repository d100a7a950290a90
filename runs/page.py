"""The report's page: frame, style and script, tables, and how numbers are written on it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from runs.figures import swatch


def number(value: float | None) -> str:
    """Four significant digits, no exponent where it can be read without: 12345.6 -> '12 346', 0.00012 -> '0.00012'.

    Thousands are set apart by a narrow space, because a comma parts the bounds of an interval.
    """
    if value is None:
        return "missing"
    if value == 0 or 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.4g}"


def interval(low: float | None, high: float | None) -> str:
    """'[low, high]', empty without bounds."""
    return "" if low is None or high is None else f"[{number(low)}, {number(high)}]"


def duration(seconds: object) -> str | None:
    """'1 h 02 min', '3 min 05 s'; None for what is no number."""
    if not isinstance(seconds, (int, float)):
        return None
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def slug(name: str) -> str:
    """'Return in evaluation' -> 'return-in-evaluation', for ids."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def value_cell(centre: float | None, low: float | None = None, high: float | None = None) -> str:
    """A number with its interval in softer ink, as HTML."""
    if centre is None:
        return '<span class="missing">missing</span>'
    bounds = interval(low, high)
    return number(centre) + (f' <span class="soft">{bounds}</span>' if bounds else "")


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "numbers") -> str:
    """A table whose first column heads its rows; a head of empty strings is left out.

    Cells are HTML already, caption and head are text.
    """
    columns = "".join(f'<th scope="col">{escape(column)}</th>' for column in head)
    top = f"<thead><tr>{columns}</tr></thead>\n" if any(head) else ""
    labels = [f' data-label="{escape(column)}"' if column else "" for column in head[1:]]  # for narrow screens
    lines = (
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f"<td{label}><div>{cell}</div></td>" for label, cell in zip(labels, row[1:], strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="{kind}">\n<caption>{escape(caption)}</caption>\n'
        f"{top}<tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>"
    )


def legend(styles: dict[str, int]) -> str:
    """A button for each line, which hides and shows it; without script just a legend. Empty for a single line."""
    if len(styles) < 2:
        return ""
    pressed = 'type="button" aria-pressed="true"'
    buttons = (
        f'<button {pressed} data-toggle="{escape(label)}">{swatch(style)}{escape(label)}</button>'
        for label, style in styles.items()
    )
    return f'<div class="legend">{"".join(buttons)}</div>'


def figure(drawing: str, note: str = "", data: str = "", styles: dict[str, int] | None = None) -> str:
    """Drawings with their legend and caption. data: see `figures.hover_data`. note is text."""
    hover = f' data-lines="{escape(data)}"' if data else ""
    caption = f"<figcaption>{escape(note[:1].upper() + note[1:])}</figcaption>\n" if note else ""
    return f"<figure{hover}>\n{legend(styles or {})}{drawing}\n{caption}</figure>"


def section(heading: str, *parts: str) -> str:
    """A section with its heading, an anchor for the list of contents."""
    body = "\n".join(filter(None, parts))
    return f'<section id="{slug(heading)}">\n<h2>{escape(heading)}</h2>\n{body}\n</section>'


def whole_page(title: str, lead: str, sections: Sequence[str]) -> str:
    """The HTML document. lead: HTML below the title; a list of contents is made from the sections' headings."""
    body = "\n".join(sections)
    found = re.findall(r'<section id="([^"]*)">\n<h2>(.*?)</h2>', body)
    contents = "".join(f'<a href="#{anchor}">{heading}</a>' for anchor, heading in found)
    nav = f'<nav aria-label="Contents">{contents}</nav>' if len(found) > 3 else ""
    return _FRAME.format(title=escape(title), style=_STYLE, script=_SCRIPT, lead=lead, nav=nav, body=body)


_FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
{lead}
</header>
{nav}
{body}
</main>
<script>{script}</script>
</body>
</html>
"""
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --soft: #57606a; --grid: #dfe3e8; --tint: #f6f8fa;
  --accent: #0063a0; --line-0: #0072b2; --line-1: #d55e00; --line-2: #009e73; --line-3: #cc79a7; --line-4: #e69f00;
  --line-5: #56b4e9; --line-6: #b8a900; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #14171c; --ink: #e6e8eb; --soft: #9aa4b0; --grid: #343b45; --tint: #1c2128; --accent: #62b5f0;
    --line-0: #4aa3df; --line-1: #f0803c; --line-2: #2fc79b; --line-3: #e39cc4; --line-4: #f2b53c; --line-5: #8fd0f7;
    --line-6: #e6dc4a; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.85rem; line-height: 1.2; margin: 0 0 .6rem; overflow-wrap: anywhere; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 3rem 0 .9rem; padding-top: .9rem; border-top: 1px solid var(--grid); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0; }
.lead, figcaption, .note, caption { color: var(--soft); }
figcaption, .note, caption { font-size: .875rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 1.25rem 0 0; font-size: .9rem; }
a { color: var(--accent); text-underline-offset: .2em; }
.warnings { border-left: 4px solid #d55e00; background: var(--tint); padding: .6rem 1rem; margin: 1.25rem 0; }
.warnings p { margin: .15rem 0; max-width: none; }
figure { margin: 0; position: relative; }
figure svg { display: block; }
.plot svg { width: 100%; height: auto; touch-action: pan-y; }
.plot svg text { font-family: inherit !important; }
.narrow { display: none; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(17.5rem, 1fr)); gap: 1.1rem 1.4rem; }
.panels.broad { grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); }
.panels figure { max-width: 26rem; }
.panels.broad figure { max-width: 34rem; }
figcaption { margin-top: .4rem; }
.legend { display: flex; flex-wrap: wrap; gap: .35rem .5rem; margin: 0 0 .6rem; }
.legend button { display: inline-flex; align-items: center; gap: .5rem; font: inherit; font-size: .875rem;
  color: inherit; background: none; border: 1px solid var(--grid); border-radius: .5rem; padding: .15rem .6rem;
  cursor: pointer; text-align: left; overflow-wrap: anywhere; }
.legend button:hover, .legend button:focus-visible { border-color: currentColor; }
.legend button[aria-pressed=false] { opacity: .45; text-decoration: line-through; }
.swatch { width: 34px; height: 12px; flex: none; fill: none; }
.tip { position: absolute; pointer-events: none; background: var(--paper); border: 1px solid var(--grid);
  border-radius: .4rem; padding: .35rem .6rem; font-size: .8rem; line-height: 1.4; white-space: nowrap; z-index: 2;
  box-shadow: 0 2px 10px rgb(0 0 0 / .18); font-variant-numeric: tabular-nums; }
.rule { position: absolute; width: 1px; background: var(--soft); pointer-events: none; opacity: .6; }
.wide { overflow-x: auto; margin: .25rem 0; }
table { border-collapse: collapse; font-size: .875rem; }
caption { text-align: left; caption-side: bottom; padding-top: .4rem; }
th, td { text-align: left; vertical-align: top; padding: .38rem 1.1rem .38rem 0; border-bottom: 1px solid var(--grid); }
th { font-weight: 600; }
thead th { color: var(--soft); font-weight: 500; white-space: nowrap; vertical-align: bottom; }
.numbers { font-variant-numeric: tabular-nums; }
.numbers .soft { white-space: nowrap; }
.numbers .seeds { display: inline-block; min-width: 9rem; }
.seeds span { display: inline-block; margin-right: .6em; }
.settings { margin-bottom: 1.2rem; }
.settings caption { caption-side: top; padding: 0 0 .2rem; }
.settings th { font-weight: 500; color: var(--soft); }
.settings th, .settings td { overflow-wrap: anywhere; min-width: 7rem; }
.settings thead th { white-space: normal; }
.matrix td, .matrix th { text-align: right; padding: .3rem .55rem; white-space: nowrap; }
.matrices { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; }
.matrices .wide { max-width: 30rem; }
.soft { color: var(--soft); }
.missing { color: var(--soft); font-style: italic; }
.chip { border: 1px solid currentColor; border-radius: 1em; padding: .05em .65em; font-size: .8rem; font-weight: 600;
  white-space: nowrap; }
.done { color: light-dark(#00694c, #3fc89a); } .running { color: light-dark(#0063a0, #62b5f0); }
.stopped { color: light-dark(#8a5a00, #e6a93c); } .failed { color: light-dark(#b34700, #ff8a4c); }
.films { display: flex; flex-wrap: wrap; gap: 1.2rem; }
.films figure { width: 15rem; }
.films video, .films img { width: 100%; border-radius: .5rem; background: #000; display: block; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .85em; }
pre { background: var(--tint); padding: 1rem; border-radius: .4rem; overflow-x: auto; }
details { margin: .4rem 0; }
summary { cursor: pointer; }
.hidden { display: none; }
@media (max-width: 40rem) {
  main { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.45rem; }
  .broadside { display: none; }
  .narrow { display: block; }
  .panels, .panels.broad { grid-template-columns: 1fr; }
  .numbers:not(.matrix) thead { display: none; }
  .numbers:not(.matrix) :is(tbody, tr, th, td, caption) { display: block; }
  .numbers:not(.matrix) tr { border-bottom: 1px solid var(--grid); padding: .45rem 0; }
  .numbers:not(.matrix) :is(th, td) { border: none; padding: .1rem 0; overflow-wrap: anywhere; }
  .numbers:not(.matrix) td[data-label] { display: grid; grid-template-columns: 9.5rem 1fr; gap: .6rem; }
  .numbers:not(.matrix) td[data-label]::before { content: attr(data-label); color: var(--soft); }
}
@media print {
  main { max-width: none; padding: 0; }
  nav, .tip, .rule, pre, #what-it-looks-like { display: none; }
  figure, tr, li, .legend { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .panels { grid-template-columns: repeat(3, 1fr); }
  .wide { overflow: visible; }
  .legend button { border: none; padding: 0 .6rem 0 0; }
}
"""
# Hover: the nearest recorded step of each visible line. Toggle: hides a line in every figure of the page.
_SCRIPT = """
const tip = document.createElement('div'), rule = document.createElement('div'), hidden = new Set();
tip.className = 'tip hidden'; rule.className = 'rule hidden';
const show = v => v.toLocaleString('en', {maximumSignificantDigits: 4});
function point(event) {
  const svg = event.currentTarget, figure = svg.closest('figure'), box = svg.getBoundingClientRect();
  const [x0, x1, y0, y1, left, right] = svg.dataset.axes.split(' ').map(Number);
  const at = left + ((event.clientX - box.left) / box.width - x0) / (x1 - x0) * (right - left);
  const lines = JSON.parse(figure.dataset.lines).filter(line => !hidden.has(line[0]));
  const steps = lines.flatMap(line => line[1]);
  if (!steps.length) return;
  const step = steps.reduce((a, b) => Math.abs(b - at) < Math.abs(a - at) ? b : a);
  const rows = [`step ${step.toLocaleString('en')}`];
  for (const [label, at, mean, low, high] of lines) {
    const i = at.reduce((best, s, j) => Math.abs(s - step) < Math.abs(at[best] - step) ? j : best, 0);
    rows.push(`${label}: ${show(mean[i])}${low ? ` [${show(low[i])}, ${show(high[i])}]` : ''}`);
  }
  tip.replaceChildren(...rows.map(text => Object.assign(document.createElement('div'), {textContent: text})));
  figure.append(rule, tip);
  const outer = figure.getBoundingClientRect();
  const x = box.left - outer.left + (x0 + (step - left) / (right - left) * (x1 - x0)) * box.width;
  const y = box.top - outer.top;
  rule.style = `left:${x}px;top:${y + y0 * box.height}px;height:${(y1 - y0) * box.height}px`;
  tip.classList.remove('hidden'); rule.classList.remove('hidden');
  const side = x > outer.width / 2 ? x - tip.offsetWidth - 12 : x + 12;
  tip.style = `left:${Math.max(0, side)}px;top:${y + y0 * box.height}px`;
}
const leave = () => { tip.classList.add('hidden'); rule.classList.add('hidden'); };
document.querySelectorAll('figure[data-lines] svg[data-axes]').forEach(svg => {
  svg.addEventListener('pointermove', point); svg.addEventListener('pointerdown', point);
  svg.addEventListener('pointerleave', leave);
});
document.querySelectorAll('[data-toggle]').forEach(button => button.addEventListener('click', () => {
  const label = button.dataset.toggle;
  hidden.has(label) ? hidden.delete(label) : hidden.add(label);
  document.querySelectorAll('[data-toggle]').forEach(other => {
    if (other.dataset.toggle === label) other.setAttribute('aria-pressed', !hidden.has(label));
  });
  document.querySelectorAll('[data-line]').forEach(line => {
    if (line.dataset.line === label) line.classList.toggle('hidden', hidden.has(label));
  });
  leave();
}));
"""
