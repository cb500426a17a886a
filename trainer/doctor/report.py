"""What the doctor says: sections of findings, figures, charts and tables, all plain values.

Deliberately does not know how they come about, nor how they are drawn.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["critical", "warning", "note"]
SEVERITIES: Sequence[Severity] = ("critical", "warning", "note")
"""Worst first. Critical: do not serve this. Warning: something is lost. Note: worth knowing."""


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be."""

    name: str
    """Of the kind of finding, for scripts: `collapsed-tower`."""
    severity: Severity
    finding: str
    remedy: str


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Those of one severity stay in their order."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


@dataclass(frozen=True)
class Series:
    """One line of a chart, with the bounds of its intervals where it has any."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    lows: Sequence[float] = ()
    highs: Sequence[float] = ()


@dataclass(frozen=True)
class Lines:
    """A chart of lines over a number."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    is_log: bool = False
    """Whether the values are drawn by their logarithm."""


@dataclass(frozen=True)
class Bars:
    """A chart of bars, one for each label, with the bounds of their intervals where they have any."""

    title: str
    x_label: str
    labels: Sequence[str]
    values: Sequence[float]
    lows: Sequence[float] = ()
    highs: Sequence[float] = ()


@dataclass(frozen=True)
class Table:
    """Rows of words."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """One question to a checkpoint."""

    title: str
    meaning: str
    """What the figures are and how to read them."""
    findings: Sequence[Finding] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    charts: Sequence[Lines | Bars] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Report:
    """All of it."""

    version: int
    data: str | None
    """The folder of the data files; None without."""
    sections: Sequence[Section]
    notes: Sequence[str] = ()
    """What of the data was left out and why."""

    @property
    def findings(self) -> list[Finding]:
        """Of all sections, worst first."""
        return worst_first(finding for section in self.sections for finding in section.findings)

    def as_json(self) -> dict[str, Any]:
        """Findings and figures, for a file."""
        return {
            "version": self.version,
            "data": self.data,
            "findings": [asdict(finding) for finding in self.findings],
            "sections": [{"title": section.title, "figures": dict(section.figures)} for section in self.sections],
        }
