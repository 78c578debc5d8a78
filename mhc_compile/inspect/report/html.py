"""The adds of a model as one HTML file that needs nothing else: no scripts, fonts or network."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from jinja2 import Environment

from ..records import Adds
from .text import by_reason, summary

__all__ = ["page", "write"]

_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ summary }}</title>
<style>
  :root { color-scheme: light dark }
  body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem }
  h1 { font-size: 1.25rem }
  h2 { font-size: 1rem; margin: 2rem 0 .5rem }
  table { border-collapse: collapse; width: 100% }
  th, td { text-align: left; vertical-align: top; padding: .2rem .9rem .2rem 0 }
  tr { border-bottom: 1px solid #8884 }
  code { overflow-wrap: anywhere }
  .number { text-align: right }
</style>
</head>
<body>
<h1>{{ summary }}</h1>
{% for chain in chains %}
<h2>Chain {{ chain[0].chain }}: {{ chain | length }} accepted</h2>
<table>
<thead><tr><th>add</th><th class="number">C</th><th>why</th><th>where</th></tr></thead>
<tbody>
{% for add in chain %}
<tr class="accepted"><td><code>{{ add.name }}</code></td><td class="number">{{ add.width }}</td>\
<td>{{ add.reason }}</td><td><code>{{ add.location }}</code></td></tr>
{% endfor %}
</tbody>
</table>
{% endfor %}
{% for reason, adds in rejected.items() %}
<h2>Rejected ({{ adds | length }}): {{ reason }}</h2>
<table>
<thead><tr><th>add</th><th>why</th><th>where</th></tr></thead>
<tbody>
{% for add in adds %}
<tr class="rejected"><td><code>{{ add.name }}</code></td>\
<td>{{ add.reason }}{% if add.detail %}: {{ add.detail }}{% endif %}</td>\
<td><code>{{ add.location }}</code></td></tr>
{% endfor %}
</tbody>
</table>
{% endfor %}
</body>
</html>
"""


def page(explanation: Adds) -> str:
    """The report as HTML; every name, reason and path is escaped."""
    environment = Environment(autoescape=True, trim_blocks=True)
    return environment.from_string(_TEMPLATE).render(
        summary=summary(explanation),
        chains=explanation.chains,
        rejected=by_reason(explanation.rejected),
    )


def write(explanation: Adds, path: str | PathLike[str]) -> None:
    """Write the report, replacing the file if it exists.

    Raises:
        OSError: the file cannot be written.
    """
    Path(path).write_text(page(explanation), encoding="utf-8")
