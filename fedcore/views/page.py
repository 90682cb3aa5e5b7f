"""The pages report.html, compare.html and audit.html.

They are Python, as the bundle of a Flower app carries no HTML files.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from fedcore.escapes import printable

__all__ = ["THEME", "Fact", "render", "render_source"]

# Name: (light, dark). Plots are drawn in the light colours; in a page each becomes its
# CSS variable, and follows the reader's mode.
THEME = {
    "ink": ("#1b1f24", "#e7e9ec"),
    "soft": ("#5d6672", "#a3abb6"),
    "line": ("#d9dde3", "#343a42"),
    "card": ("#ffffff", "#1c2025"),
    "page": ("#f5f6f8", "#131619"),
    "good": ("#1a7f4b", "#4cc38a"),
    "warn": ("#9a5b00", "#e3a33c"),
    "bad": ("#b3261e", "#f2877f"),
    "s0": ("#2a6fd0", "#5a9cf0"),
    "s1": ("#e0662a", "#f0864e"),
    "s2": ("#189a6c", "#35b98a"),
    "s3": ("#d9a00c", "#e2b53a"),
    "s4": ("#7a56c8", "#a68bea"),
    "s5": ("#d4487e", "#e8739f"),
    "s6": ("#4a9bb0", "#6fbccf"),
    "s7": ("#8a6a3d", "#b8966a"),
    "s8": ("#6f7a32", "#a3ae5e"),
    "s9": ("#8b93a0", "#7d8692"),
}


class Fact(NamedTuple):
    """A number in a box at the top of a page."""

    name: str
    value: str
    detail: str


LIGHT = " ".join(f"--{name}: {light};" for name, (light, _) in THEME.items())
DARK = " ".join(f"--{name}: {dark};" for name, (_, dark) in THEME.items())

STYLE = """
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, Arial, sans-serif;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 56px; }
h1 {
  font-size: 1.75rem; line-height: 1.2; margin: 0; letter-spacing: -.01em;
  overflow-wrap: anywhere;
}
h2 { font-size: 1.15rem; margin: 40px 0 12px; }
h3 { font-size: .98rem; margin: 0; }
p { margin: 0; }
a { color: var(--s0); }
.kind {
  color: var(--soft); font-size: .85rem; letter-spacing: .04em; margin-bottom: 6px;
}
.title { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 14px; }
.badge {
  font-size: .82rem; font-weight: 600; border: 1px solid currentColor;
  border-radius: 99px; padding: 1px 11px; white-space: nowrap;
}
.good { color: var(--good); }
.warn { color: var(--warn); }
.bad { color: var(--bad); }
.soft { color: var(--soft); font-size: .88rem; line-height: 1.45; }
.reference { color: var(--soft); margin-top: 4px; }
.summary { max-width: 76ch; margin-top: 16px; }
.note {
  border-left: 3px solid var(--warn); background: var(--card); padding: 8px 14px;
  margin-top: 14px; overflow-wrap: anywhere;
}
.facts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 24px 0 0;
}
.fact, figure, details, .sheet {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
}
.fact { padding: 12px 16px; }
.fact b {
  display: block; font-size: 1.35rem; line-height: 1.3; font-weight: 650;
  overflow-wrap: anywhere;
}
.fact.first b { color: var(--s0); font-size: 1.6rem; line-height: 1.14; }
.fact span { display: block; }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px; }
.plots .wide { grid-column: 1 / -1; }
figure { margin: 0; padding: 14px 16px 10px; display: flex; flex-direction: column; }
figure svg {
  display: block; width: 100%; height: auto; margin-top: auto; padding-top: 8px;
}
.wide svg { max-width: 680px; margin-inline: auto; }
details { margin-top: 12px; padding: 10px 16px; }
.sheet { padding: 6px 16px; }
summary { cursor: pointer; font-weight: 600; }
details[open] > summary { margin-bottom: 8px; }
pre { overflow-x: auto; font-size: .84rem; line-height: 1.45; margin: 8px 0 4px; }
.command {
  background: var(--page); border: 1px solid var(--line); border-radius: 6px;
  padding: 9px 12px; white-space: pre-wrap; overflow-wrap: anywhere;
}
code, pre { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
.scroll { overflow-x: auto; }
table {
  border-collapse: collapse; font-size: .9rem; width: 100%;
  font-variant-numeric: tabular-nums;
}
th { text-align: left; color: var(--soft); font-weight: 500; }
td, th { padding: 5px 18px 5px 0; vertical-align: top; }
tr + tr td, thead + tbody td { border-top: 1px solid var(--line); }
.named td:first-child { min-width: 9.5em; }
th.group { color: var(--ink); font-weight: 600; padding-top: 14px; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.n:last-child, th.n:last-child { padding-right: 0; }
.pairs td:first-child { color: var(--soft); white-space: nowrap; width: 1%; }
.pairs td { overflow-wrap: anywhere; }
.dot {
  display: inline-block; width: 10px; height: 10px; border-radius: 50%;
  margin-right: 8px;
}
.columns {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(290px, 100%), 1fr));
  gap: 14px;
}
.columns > div {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 16px;
}
ul { margin: 6px 0 2px; padding-left: 1.15em; }
li { margin: 3px 0; overflow-wrap: anywhere; }
.client {
  display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1.5fr); gap: 10px 26px;
  padding: 14px 0;
}
.client + .client { border-top: 1px solid var(--line); }
.client .title { gap: 6px 8px; }
.client .badge { font-size: .76rem; }
.client p { margin-top: 6px; }
.client .pairs { font-size: .88rem; }
details .badge { margin-left: 8px; }
.images {
  display: grid; grid-template-columns: repeat(8, minmax(0, 1fr)); gap: 8px;
  align-content: start;
}
.images .soft { grid-column: 1 / -1; margin: 0; }
.images img {
  display: block; width: 100%; aspect-ratio: 1; object-fit: contain;
  image-rendering: pixelated; border-radius: 3px; background: var(--line);
}
.images img + img { margin-top: 3px; }
.images span {
  display: block; text-align: center; font-size: .76rem; color: var(--soft);
  font-variant-numeric: tabular-nums;
}
footer { color: var(--soft); font-size: .85rem; margin-top: 36px; }
@media (max-width: 760px) {
  main { padding: 18px 12px 40px; }
  h1 { font-size: 1.4rem; }
  h2 { margin-top: 30px; }
  .facts { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px; }
  .fact { padding: 10px 12px; }
  .fact b { font-size: 1.25rem; }
  .fact.first { grid-column: 1 / -1; }
  .fact.first b { font-size: 1.9rem; }
  .client { grid-template-columns: minmax(0, 1fr); }
  .images { grid-template-columns: repeat(4, minmax(0, 1fr)); }
  .plots { grid-template-columns: minmax(0, 1fr); }
  figure { padding: 12px 10px 6px; }
}
@media print { body { background: none; } figure, .fact { break-inside: avoid; } }
"""

BASE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }} - fedcore</title>
<style>
:root { color-scheme: light dark; {{ light }} }
@media (prefers-color-scheme: dark) { :root { {{ dark }} } }
{{- style }}</style>
</head>
<body>
<main>
{% block main %}{% endblock %}
</main>
</body>
</html>
"""

MACROS = """\
{% macro figure(plot) %}
<figure{% if plot.wide %} class="wide"{% endif %}>
<h3>{{ plot.title }}</h3>
<p class="soft">{{ plot.caption }}</p>
{{ plot.picture }}</figure>
{% endmacro %}
{% macro table(head, body) %}<div class="scroll"><table><thead><tr>
{%- for name in head %}
<th{% if not loop.first %} class="n"{% endif %}>{{ name }}</th>
{%- endfor %}
</tr></thead>
<tbody>{% for row in body %}<tr>
{%- if row|length == 1 and head|length > 1 %}
<th colspan="{{ head|length }}" class="group">{{ row[0] }}</th>
{%- else %}
{% for cell in row %}
<td{% if not loop.first %} class="n"{% endif %}>{{ cell }}</td>
{%- endfor %}
{% endif %}
</tr>
{% endfor %}</tbody></table></div>{% endmacro %}
{% macro pairs(items) %}<table class="pairs">{% for key, value in items %}
<tr><td>{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}</table>{% endmacro %}
"""

REPORT = """\
{% extends "base" %}{% from "macros" import figure, table, pairs %}
{% block main %}
<header>
<p class="kind">fedcore run report</p>
<div class="title"><h1>{{ title }}</h1>
<span class="badge {{ 'good' if done else 'warn' }}">{{ status }}</span></div>
{% if reference %}<p class="reference">{{ reference }}</p>{% endif %}
</header>
<p class="summary">{{ summary }}</p>
{% for note in notes %}<p class="note">{{ note }}</p>
{% endfor %}
<div class="facts">
{% for fact in facts %}
<div class="fact{% if loop.first %} first{% endif %}">
<span class="soft">{{ fact.name }}</span><b>{{ fact.value }}</b>
<span class="soft">{{ fact.detail }}</span></div>
{% endfor %}</div>
{% for name, plots in sections if plots %}<section>
<h2>{{ name }}</h2>
<div class="plots">
{% for plot in plots %}{{ figure(plot) }}{% endfor %}</div>
</section>
{% endfor %}
<section>
<h2>Numbers and reproduction</h2>
<div class="sheet"><p style="margin-top: 8px">Run it again, with seed {{ seed }}:</p>
<pre class="command">{{ command }}</pre>
<p class="soft" style="margin-bottom: 8px">
That file holds every setting, defaults included; it is printed below.
{% if sha256 %}The run ended with parameters of SHA-256
<code style="overflow-wrap: anywhere">{{ sha256 }}</code>:
the same versions on the same kind of machine give the same.{% endif %}</p></div>
{% if dropped %}<details open><summary>Requests without a usable update</summary>
{{ table(["reason", "requests", "share of all"], dropped) }}</details>{% endif %}
{% if troubles %}
<details open><summary>Clients that were left out, or stand out</summary>
{{ table(troubles[0], troubles[1:]) }}
{% if num_troubles > troubles|length - 1 %}<p class="soft">
The first {{ troubles|length - 1 }} of {{ num_troubles }} clients that were left out,
clipped, weighted below half of the mean, or three times as long as the median;
clients.parquet has all.</p>
{% endif %}</details>{% endif %}
{% if heard %}<details open>
<summary>Clients by speed: who was heard, and what they get</summary>
{{ table(heard[0], heard[1:]) }}</details>{% endif %}
{% for when, text in samples %}<details open>
<summary>Text that the model writes, {{ when }}</summary><pre>{{ text }}</pre></details>
{% endfor %}
{% if evaluations %}<details><summary>Every evaluation</summary>
{{ table(evaluations[0], evaluations[1:]) }}</details>{% endif %}
<details><summary>Settings (config.toml)</summary><pre>{{ config }}</pre></details>
{% if environment %}
<details><summary>Environment</summary>{{ pairs(environment) }}</details>
{%- endif %}
</section>
<footer>Written by fedcore {{ version }} from {{ folder }}.
Everything on this page is in this one file.</footer>
{% endblock %}
"""

COMPARE = """\
{% extends "base" %}{% from "macros" import figure, table, pairs %}
{% block main %}
<header>
<p class="kind">fedcore comparison</p>
<div class="title"><h1>{{ title }}</h1></div>
</header>
<p class="summary">{{ summary }}</p>
{% for note in notes %}<p class="note">{{ note }}</p>
{% endfor %}
<h2>Results</h2>
<div class="sheet">{{ table(results[0], results[1:]) }}</div>
<p class="soft" style="margin-top: 8px">{{ explained }}</p>
{% if plots %}<h2>Curves</h2>
<div class="plots">
{% for plot in plots %}{{ figure(plot) }}{% endfor %}</div>{% endif %}
<h2>What was compared</h2>
{% if differences|length > 1 %}
<div class="sheet">{{ table(differences[0], differences[1:]) }}</div>
<p class="soft" style="margin-top: 8px">
Every other setting is the same in all of them.</p>
{% else %}<p>All settings are the same.</p>{% endif %}
<details><summary>Run directories</summary>{{ pairs(runs) }}</details>
<footer>Written by fedcore {{ version }} from {{ folder }}.
Everything on this page is in this one file.</footer>
{% endblock %}
"""

AUDIT = """\
{% extends "base" %}{% from "macros" import figure, table, pairs %}
{% block main %}
<header>
<p class="kind">fedcore privacy audit</p>
<div class="title"><h1>{{ title }}</h1>
<span class="badge {{ tone }}">{{ badge }}</span></div>
</header>
<p class="summary">{{ summary }}</p>
<p class="note"><b>Personal data.</b> {{ personal }}</p>
{% for note in notes %}<p class="note">{{ note }}</p>
{% endfor %}
<div class="facts">
{% for fact in facts %}
<div class="fact{% if loop.first %} first{% endif %}">
<span class="soft">{{ fact.name }}</span><b>{{ fact.value }}</b>
<span class="soft">{{ fact.detail }}</span></div>
{% endfor %}</div>
<section>
<h2>Who attacks, and what they had</h2>
<p class="summary" style="margin: 0 0 12px">{{ adversary }}</p>
<div class="columns">
{% for name, points in threat %}
<div><h3>{{ name }}</h3>
<ul>{% for point in points %}<li>{{ point }}</li>{% endfor %}</ul></div>
{% endfor %}</div>
<details><summary>The attacks</summary>{{ pairs(attacks) }}</details>
</section>
{% if advice %}<section>
<h2>What to switch on</h2>
{% for line in measured %}<p class="summary" style="margin: 0 0 10px">{{ line }}</p>
{% endfor %}<div class="columns">
{% for a in advice %}<div><h3>{{ a.name }}</h3><p class="soft">{{ a.against }}</p>
<p style="margin-top: 6px">{{ a.why }}</p><pre class="command">{{ a.how }}</pre></div>
{% endfor %}</div>
</section>
{% endif %}
<section>
<h2>Verdict by client</h2>
<p class="soft">{{ grades }}</p>
{% for cell in cells %}
<details{% if cell.open %} open{% endif %}><summary>{{ cell.name }}
<span class="badge {{ cell.tone }}">{{ cell.badge }}</span></summary>
{% for c in cell.clients %}<article class="client">
<div><div class="title"><h3>{{ c.name }}</h3>
{% for mark in c.marks %}
<span class="badge {{ mark.tone }}">{{ mark.text }}</span>
{% endfor %}
</div>
{% for line in c.lines %}<p>{{ line }}</p>
{% endfor %}{% if c.advice %}<p><b>Switch on:</b> {{ c.advice }}.</p>{% endif %}</div>
<div class="images">
{% if c.pairs %}
<p class="soft">Originals over what {{ c.attack }} rebuilt,
with the PSNR of each pair in dB</p>
{% for original, rebuilt, psnr in c.pairs %}
<div><img alt="original {{ loop.index }} of {{ c.name }}"
src="data:image/png;base64,{{ original }}">
<img alt="what was rebuilt of it" src="data:image/png;base64,{{ rebuilt }}">
<span>{{ psnr }}</span></div>
{% endfor %}
{% else %}<p class="soft">{{ c.without }}</p>
{% endif %}</div>
</article>
{% endfor %}</details>
{% endfor %}
</section>
{% if plots %}<section>
<h2>Curves</h2>
<div class="plots">
{% for plot in plots %}{{ figure(plot) }}{% endfor %}</div>
</section>
{% endif %}
<section>
<h2>Numbers</h2>
<div class="sheet named">{{ table(results[0], results[1:]) }}</div>
<p class="soft" style="margin-top: 8px">{{ explained }}</p>
</section>
<section>
<h2>Reproduction</h2>
<div class="sheet"><p style="margin-top: 8px">Audit again, with seed {{ seed }}:</p>
<pre class="command">{{ command }}</pre>
<p class="soft" style="margin-bottom: 8px">Equal seeds and versions on the same kind
of machine give the same numbers; times differ.</p></div>
<details><summary>Settings of the attacks</summary>{{ pairs(settings) }}</details>
<details><summary>Settings of the federation</summary><pre>{{ config }}</pre></details>
<details><summary>Versions and times</summary>{{ pairs(environment) }}</details>
</section>
<footer>Written by fedcore {{ version }}. Everything on this page is in this one file;
audit.json beside it holds the numbers, and no image.</footer>
{% endblock %}
"""

TEMPLATES = {
    "base": BASE,
    "macros": MACROS,
    "report": REPORT,
    "compare": COMPARE,
    "audit": AUDIT,
}


_pages = Environment(
    loader=DictLoader(TEMPLATES),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
)


def render(page: str, **values: Any) -> str:
    """The page "report", "compare" or "audit", with everything it needs inside."""
    return render_source(TEMPLATES[page], **values)


def render_source(source: str, **values: Any) -> str:
    """A page whose template is kept elsewhere; it extends "base"."""
    template = _pages.from_string(source)
    text = template.render(style=Markup(STYLE), light=LIGHT, dark=DARK, **values)
    # Names and reasons of others are in it, and a browser turns text as they ask.
    return printable(text)
