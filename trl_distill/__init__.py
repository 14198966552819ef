"""On-policy distillation of language models, on top of TRL: the student writes, the teacher judges every token."""

from ._version import __version__
from .checkpoints import CheckpointError
from .config import OPDConfig
from .guards import NonFiniteLossError, RunawayError, StopOnSigterm, StoppedBySignal
from .heads import LMHead
from .process_group import distributed_main
from .report import TokenReport
from .self_teachers import AdapterOff, MovingAverage
from .served import ServedTeacher
from .signals import HiddenStates, Rollouts, TeacherAnswerError, TeacherUnavailable, TokenLogProbs
from .teachers import Teacher
from .trainer import OPDTrainer


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
