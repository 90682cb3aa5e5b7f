"""The page of report.html. In Python, because a Flower app bundle carries no HTML files."""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }} - fedcore</title>
<style>
  :root { color-scheme: light dark; --line: #8884; --soft: #888; --card: #fff; --page: #f6f7f9; --ink: #1a1d21; --accent: #1f77b4; }
  @media (prefers-color-scheme: dark) { :root { --card: #1d2126; --page: #14171a; --ink: #e6e8ea; --accent: #6ab0e6; } }
  body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
  main { max-width: 1120px; margin: 0 auto; padding: 24px 16px 64px; }
  h1 { font-size: 1.7rem; margin: 0 0 4px; } h2 { font-size: 1.05rem; margin: 0; }
  p { margin: 4px 0; } .soft { color: var(--soft); font-size: .9rem; }
  .facts { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0; }
  .fact { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 16px; flex: 1 1 150px; }
  .fact b { display: block; font-size: 1.5rem; color: var(--accent); white-space: nowrap; }
  .fact:not(:first-child) b { font-size: 1.2rem; line-height: 2.25rem; color: inherit; }
  .plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 16px; }
  figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 0; padding: 14px; }
  figure svg { width: 100%; height: auto; display: block; margin-top: 8px; }
  @media (prefers-color-scheme: dark) { figure svg { filter: invert(.88) hue-rotate(180deg); } }
  details { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin-top: 16px; padding: 10px 16px; }
  summary { cursor: pointer; font-weight: 600; }
  pre { overflow-x: auto; font-size: .85rem; } code { font-size: .95em; overflow-wrap: anywhere; }
  table { border-collapse: collapse; font-size: .9rem; } td { padding: 2px 16px 2px 0; vertical-align: top; overflow-wrap: anywhere; }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p>{{ summary }}</p>
<div class="facts">{% for name, value in facts %}
  <div class="fact"><b>{{ value }}</b><span class="soft">{{ name }}</span></div>{% endfor %}
</div>
<div class="plots">{% for name, caption, picture in plots %}
  <figure><h2>{{ name }}</h2><p class="soft">{{ caption }}</p>{{ picture }}</figure>{% endfor %}
</div>
{% if dropped %}<details open><summary>Clients left out</summary>
<table>{% for reason, n in dropped %}<tr><td>{{ reason }}</td><td>{{ n }}</td></tr>{% endfor %}</table></details>{% endif %}
{% if command %}<details><summary>Run it again</summary><p><code>{{ command }}</code></p>
<p class="soft">Every setting, defaults included; the same seed gives the same bits on the same machine.</p><pre>{{ config }}</pre></details>
{% else %}<details><summary>All numbers</summary><pre>{{ config }}</pre></details>
{% endif %}{% if environment %}<details><summary>Environment</summary><table>{% for key, value in environment.items() %}<tr><td>{{ key }}</td><td>{{ value }}</td></tr>{% endfor %}</table></details>{% endif %}
</main>
</body>
</html>
"""
