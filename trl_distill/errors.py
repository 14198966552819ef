"""Every exception of this package that a caller may want to catch."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; earlier ones are as they were."""


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite. Nothing was trained on it."""

    on_all_processes = True


class RunawayError(RuntimeError):
    """Completions are cut, or repeat themselves, far beyond what was allowed."""

    on_all_processes = True


class StoppedBySignal(RuntimeError):
    """SIGTERM has ended the run after a step; what was trained is in a checkpoint, which the message names."""

    on_all_processes = True


class TeacherUnavailable(RuntimeError):
    """The teacher did not answer within its time-outs and retries."""


class TeacherAnswerError(RuntimeError):
    """The teacher answered something that cannot be taken as its judgement of the tokens that it was asked about."""
