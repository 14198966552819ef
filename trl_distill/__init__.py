"""On-policy distillation of language models, on top of TRL: the student writes, the teacher scores every token."""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__


if TYPE_CHECKING:
    from .config import OPDConfig
    from .errors import (
        CheckpointError,
        NonFiniteLossError,
        RunawayError,
        StoppedBySignal,
        TeacherAnswerError,
        TeacherUnavailable,
    )
    from .heads.lm_head import LMHead
    from .reporting.tokens import TokenReport
    from .rollouts import Rollouts
    from .signals import HiddenStates, TokenLogProbs
    from .teachers.base import Teacher
    from .teachers.self_distillation import AdapterOff, MovingAverage
    from .teachers.server import ServedTeacher
    from .training.interrupts import StopOnSigterm
    from .training.process_group import distributed_main
    from .training.trainer import OPDTrainer


_MODULES = {  # imported on first use, so that `trl-distill --help` does not wait for PyTorch
    "AdapterOff": "teachers.self_distillation",
    "CheckpointError": "errors",
    "HiddenStates": "signals",
    "LMHead": "heads.lm_head",
    "MovingAverage": "teachers.self_distillation",
    "NonFiniteLossError": "errors",
    "OPDConfig": "config",
    "OPDTrainer": "training.trainer",
    "Rollouts": "rollouts",
    "RunawayError": "errors",
    "ServedTeacher": "teachers.server",
    "StopOnSigterm": "training.interrupts",
    "StoppedBySignal": "errors",
    "Teacher": "teachers.base",
    "TeacherAnswerError": "errors",
    "TeacherUnavailable": "errors",
    "TokenLogProbs": "signals",
    "TokenReport": "reporting.tokens",
    "distributed_main": "training.process_group",
}

__all__ = [
    "AdapterOff",
    "CheckpointError",
    "HiddenStates",
    "LMHead",
    "MovingAverage",
    "NonFiniteLossError",
    "OPDConfig",
    "OPDTrainer",
    "Rollouts",
    "RunawayError",
    "ServedTeacher",
    "StopOnSigterm",
    "StoppedBySignal",
    "Teacher",
    "TeacherAnswerError",
    "TeacherUnavailable",
    "TokenLogProbs",
    "TokenReport",
    "__version__",
    "distributed_main",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
