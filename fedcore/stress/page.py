"""The page stress.html, as a template."""

__all__ = ["TEMPLATE"]

STYLE = """
.heat { border-collapse: separate; border-spacing: 3px; width: auto; }
.heat td { border: 0; padding: 4px 8px; border-radius: 5px; text-align: right;
  white-space: nowrap; vertical-align: middle; }
.heat td span { display: block; font-size: .78rem; font-weight: 400; }
.heat th { padding: 4px 8px; white-space: nowrap; vertical-align: middle; }
.heat th.n { font-size: .8rem; vertical-align: bottom; white-space: normal; }
.heat tbody th { color: var(--ink); text-align: left; }
.heat td.h { background: color-mix(in srgb, color-mix(in oklab, var(--bad)
  calc(var(--h) * 1%), var(--good)) 30%, var(--card)); }
.heat td.edge { border-left: 3px solid var(--card); font-weight: 600; }
"""

TEMPLATE = """\
{% extends "base" %}{% from "macros" import figure, table, pairs %}
{% block main %}
<style>@STYLE@</style>
<header>
<p class="kind">fedcore stress test</p>
<div class="title"><h1>{{ title }}</h1>
<span class="badge {{ tone }}">{{ badge }}</span></div>
</header>
<p class="summary">{{ summary }}</p>
{% for note in notes %}<p class="note">{{ note }}</p>
{% endfor %}
{% if facts %}<div class="facts">
{% for fact in facts %}
<div class="fact{% if loop.first %} first{% endif %}">
<span class="soft">{{ fact.name }}</span><b>{{ fact.value }}</b>
<span class="soft">{{ fact.detail }}</span></div>
{% endfor %}</div>{% endif %}
<section>
<h2>Rule by attack</h2>
{% for map in maps %}
<h3 style="margin: 14px 0 6px">{{ map.name }}</h3>
<div class="sheet scroll"><table class="heat"><thead><tr><th></th>
{% for name in map.head %}<th class="n">{{ name }}</th>
{% endfor %}</tr></thead><tbody>
{% for row in map.rows %}<tr><th>{{ row.name }}</th>
{% for cell in row.cells %}
<td class="{% if cell.heat is not none %}h{% endif %}
{%- if loop.index > map.plain %} edge{% endif %}"
{% if cell.heat is not none %} style="--h: {{ cell.heat }}"{% endif %}
 title="{{ cell.title }}">{{ cell.text }}
{%- if cell.detail %}<span class="soft">{{ cell.detail }}</span>{% endif %}</td>
{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endfor %}
<p class="soft" style="margin-top: 8px">{{ reading }}</p>
{% for map in maps %}
<details><summary>What each attack does, {{ map.name }}</summary>
{{ table(map.damages[0], map.damages[1:]) }}
<p class="soft">The column absent minus that of the attack{{ unit }}: the attackers'
data are missing either way.</p></details>
{% endfor %}
</section>
<section>
<h2>What to choose</h2>
{% for line in measured %}<p class="summary" style="margin: 0 0 8px">{{ line }}</p>
{% endfor %}<div class="columns">
{% for a in advice %}<div><h3>{{ a.name }}</h3><p class="soft">{{ a.against }}</p>
<p style="margin-top: 6px">{{ a.why }}</p><pre class="command">{{ a.how }}</pre></div>
{% endfor %}</div>
</section>
{% if plots %}<section>
<h2>Curves and clients</h2>
<div class="plots">
{% for plot in plots %}{{ figure(plot) }}{% endfor %}</div>
</section>{% endif %}
<section>
<h2>What a rule costs without an attacker</h2>
{% for map in maps if map.costs|length > 1 %}
<h3 style="margin: 14px 0 6px">{{ map.name }}</h3>
<div class="sheet">{{ table(map.costs[0], map.costs[1:]) }}</div>
{% endfor %}
<p class="soft" style="margin-top: 8px">Robust rules punish rare data: look at the
worst tenth of the clients before you choose one.</p>
</section>
<section>
<h2>Reproduction</h2>
<div class="sheet"><p style="margin-top: 8px">Test again, from seed {{ seed }}:</p>
<pre class="command">{{ command }}</pre>
<p class="soft" style="margin-bottom: 8px">Each cell is an ordinary run:
fedcore report makes the report of its directory.</p></div>
<details><summary>The command of each cell</summary>{{ pairs(commands) }}</details>
<details><summary>Settings of the federation</summary><pre>{{ config }}</pre></details>
</section>
<footer>Written by fedcore {{ version }} from {{ folder }}.
Everything on this page is in this one file; stress.json beside it holds the numbers.
</footer>
{% endblock %}
""".replace("@STYLE@", STYLE)
