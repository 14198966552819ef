"""On-policy distillation of language models, on top of TRL: the student writes, the teacher judges every token."""

from ._version import __version__
from .config import OPDConfig
from .heads import LMHead
from .signals import HiddenStates, Rollouts
from .teachers import Teacher
from .trainer import OPDTrainer


__all__ = ["HiddenStates", "LMHead", "OPDConfig", "OPDTrainer", "Rollouts", "Teacher", "__version__"]
