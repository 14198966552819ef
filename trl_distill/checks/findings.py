"""What a check found, and the report that collects findings."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any


logger = logging.getLogger(__name__)


@dataclass
class Finding:
    """
    What one check found.

    Attributes:
        check (`str`): what was looked at, two or three words.
        level (`str`): "ok", "skipped" (could not be looked at), "warning" (the run may go on) or "error" (it may not).
        found (`str`): what was found and what it means.
        advice (`str`): what to change; empty where all is well.
    """

    check: str
    level: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.found} {self.advice}".strip()


class PreflightError(ValueError):
    """
    What a run cannot get past.

    Attributes:
        report ([`Report`]): everything that was found until then.
    """

    def __init__(self, report: Report):
        errors = [str(finding) for finding in report.findings if finding.level == "error"]
        super().__init__("\n\n".join(errors))
        self.report = report


@dataclass
class Report:
    """What the checks found, in order."""

    findings: list[Finding] = field(default_factory=list)

    def add(self, *findings: Finding) -> None:
        self.findings.extend(findings)

    def count(self, level: str) -> int:
        return sum(finding.level == level for finding in self.findings)

    def stop_on_errors(self) -> None:
        """Raise [`PreflightError`], a `ValueError`, with everything that a run cannot get past."""
        if self.count("error"):
            raise PreflightError(self)

    def warn(self) -> None:
        """Log what may be wrong, and how much was looked at."""
        for finding in self.findings:
            if finding.level == "warning":
                logger.warning(str(finding))
            elif finding.check == "stop tokens" and "one class" in finding.found:
                logger.warning(finding.found)
        logger.info(f"Preflight: {len(self.findings)} checks, {self.count('warning')} warnings.")

    def table(self) -> Any:
        """A `rich` table with a line for each check, and what it adds up to."""
        from rich.table import Table

        colours = {"ok": "green", "skipped": "dim", "warning": "yellow", "error": "red"}
        table = Table(title="Preflight", show_lines=True)
        table.add_column("check", no_wrap=True)
        table.add_column("")
        table.add_column("found, and what it means", ratio=3, overflow="fold")
        table.add_column("what to change", ratio=2, overflow="fold")
        for finding in self.findings:
            level = f"[{colours[finding.level]}]{finding.level}[/]"
            table.add_row(finding.check, level, _plain(finding.found), _plain(finding.advice))
        table.caption = f"{len(self.findings)} checks, {self.count('warning')} warnings, {self.count('error')} errors"
        return table


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)
