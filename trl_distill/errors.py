"""The exceptions of this package that a caller may want to catch."""

from __future__ import annotations

from typing import Any


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; earlier checkpoints are unchanged."""

    on_all_processes = False


class NonFiniteLossError(RuntimeError):
    """The loss, or a reward, is NaN or infinite. No step was made with it."""

    on_all_processes = True


class RunawayError(RuntimeError):
    """Too many completions are cut or repeat themselves, see `stop_above_truncation` and `stop_above_repetition`."""

    on_all_processes = True


class StoppedBySignal(RuntimeError):
    """SIGTERM ended the run after a step; the message names the checkpoint with what was trained."""

    on_all_processes = True


class TeacherUnavailable(RuntimeError):
    """The teacher is unavailable: it did not answer within its timeouts and retries."""


class TeacherAnswerError(RuntimeError):
    """The teacher's answer is malformed, or does not match the tokens that were sent."""


class PreflightError(ValueError):
    """
    The errors that the preflight found.

    Attributes:
        report ([`~trl_distill.checks.findings.Report`]): all findings so far.
    """

    def __init__(self, report: Any):
        errors = [str(finding) for finding in report.findings if finding.level == "error"]
        super().__init__("\n\n".join(errors))
        self.report = report


class RowError(ValueError):
    """
    A row that cannot be used; the message says where, why, and what to write instead.

    Attributes:
        reason (`str`): the reason in a few words, by which errors are counted.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason
