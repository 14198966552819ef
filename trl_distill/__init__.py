"""On-policy distillation of language models, on top of TRL: the student writes, the teacher judges every token."""

from ._version import __version__
from .config import OPDConfig
from .teachers import Teacher
from .trainer import OPDTrainer


__all__ = ["OPDConfig", "OPDTrainer", "Teacher", "__version__"]
