"""The exceptions of this package that a caller may want to catch."""

from __future__ import annotations


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
