"""The report as one HTML page that needs nothing but itself.

Deliberately does not know what is in the report.
"""

from collections.abc import Iterator
from html import escape

from trainer.doctor.charts import svg
from trainer.doctor.report import Finding, Report, Section, Table, worst_first

_STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1f2937; --soft: #6b7280; --line: #d1d5db; --box: #f9fafb;
  --critical: #b91c1c; --warning: #b45309; --note: #1d4ed8; --well: #047857; }
@media (prefers-color-scheme: dark) {
  :root { --back: #111827; --text: #e5e7eb; --soft: #9ca3af; --line: #374151; --box: #1f2937;
    --critical: #f87171; --warning: #fbbf24; --note: #93c5fd; --well: #34d399; } }
body { background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
p.meaning, p.note { color: var(--soft); }
.finding { border-left: 4px solid var(--colour); background: var(--box); padding: .5rem .8rem; margin: .6rem 0; }
.finding b { color: var(--colour); } .finding p { margin: .2rem 0; }
.critical { --colour: var(--critical); } .warning { --colour: var(--warning); } .note { --colour: var(--note); }
.well { --colour: var(--well); }
.row { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.row > * { margin: 0; flex: 0 1 30rem; min-width: 0; }
figcaption { font-weight: 600; } svg { width: 100%; height: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-size: 14px; } caption { text-align: left; font-weight: 600; }
th, td { text-align: left; padding: .15rem .9rem .15rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: break-word; }
.wide { overflow-x: auto; }
"""


def html(report: Report) -> str:
    """The whole page; no address outside it is in it."""
    body = "\n".join(_body(report))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Checkpoint {report.version}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _body(report: Report) -> Iterator[str]:
    yield f"<h1>Checkpoint {report.version}</h1>"
    on = "without data: give its folder for all sections" if report.data is None else f"on the data in {report.data}"
    yield f'<p class="meaning">twotower doctor, {escape(on)}</p>'
    for note in report.notes:
        yield f'<p class="note">{escape(note)}</p>'
    yield "<h2>Findings</h2>"
    yield from map(_finding, report.findings)
    if not report.findings:
        yield '<div class="finding well"><p><b>nothing found</b></p></div>'
    for section in report.sections:
        yield from _section(section)


def _section(section: Section) -> Iterator[str]:
    yield f"<h2>{escape(section.title)}</h2>"
    yield f'<p class="meaning">{escape(section.meaning)}</p>'
    yield from map(_finding, worst_first(section.findings))
    row = [f"<figure><figcaption>{escape(chart.title)}</figcaption>{svg(chart)}</figure>" for chart in section.charts]
    if section.figures:
        figures = [(name.replace("_", " "), f"{value:.4g}") for name, value in section.figures.items()]
        row.append(_table(Table("Figures", ("figure", "value"), figures)))
    if row:
        yield f'<div class="row">{"".join(row)}</div>'
    yield from map(_table, section.tables)


def _finding(finding: Finding) -> str:
    return (
        f'<div class="finding {finding.severity}"><p><b>{finding.severity}: {escape(finding.name)}</b></p>'
        f"<p>{escape(finding.finding)}</p><p>Remedy: {escape(finding.remedy)}</p></div>"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f'<div class="wide"><table><caption>{escape(table.title)}</caption><tr>{head}</tr>{rows}</table></div>'
