"""A check's finding, and the report that collects findings."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from ..errors import PreflightError
from ..foreign_text import as_written


logger = logging.getLogger(__name__)


@dataclass
class Finding:
    """
    The result of one check.

    Attributes:
        check (`str`): what was checked, in two or three words.
        level (`str`): "ok", "skipped" (could not be checked), "warning" (the run continues) or "error" (it does not).
        found (`str`): what was found and what it means.
        advice (`str`): what to change; empty if nothing.
        notify (`bool`): whether to log it at level "ok" too, because the run does something that not everybody expects.
    """

    check: str
    level: str
    found: str
    advice: str = ""
    notify: bool = False

    def __str__(self) -> str:
        return f"{self.found} {self.advice}".strip()


@dataclass
class Report:
    """The findings of all checks, in order."""

    findings: list[Finding] = field(default_factory=list)

    def add(self, *findings: Finding) -> None:
        self.findings.extend(findings)

    def count(self, level: str) -> int:
        return sum(finding.level == level for finding in self.findings)

    def stop_on_errors(self) -> None:
        """Raise [`PreflightError`], a `ValueError`, with all errors, if there are any."""
        if self.count("error"):
            raise PreflightError(self)

    def warn(self) -> None:
        """Log the warnings and the number of checks."""
        for finding in self.findings:
            if finding.level == "warning":
                logger.warning(str(finding))
            elif finding.notify:
                logger.warning(finding.found)
        logger.info(f"Preflight: {len(self.findings)} checks, {self.count('warning')} warnings.")

    def table(self) -> Any:
        """A `rich` table with a row for each check, and the totals."""
        from rich.table import Table

        colours = {"ok": "green", "skipped": "dim", "warning": "yellow", "error": "red"}
        table = Table(title="Preflight", show_lines=True)
        table.add_column("check", no_wrap=True)
        table.add_column("")
        table.add_column("finding", ratio=3, overflow="fold")
        table.add_column("what to change", ratio=2, overflow="fold")
        for finding in self.findings:
            level = as_written(finding.level, colours[finding.level])
            table.add_row(as_written(finding.check), level, as_written(finding.found), as_written(finding.advice))
        table.caption = f"{len(self.findings)} checks, {self.count('warning')} warnings, {self.count('error')} errors"
        return table
