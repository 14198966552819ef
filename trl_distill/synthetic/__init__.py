"""Synthetic data: teachers complete prompts; what they wrote is verified, filtered, rid of duplicates and saved."""

from .config import GenerateConfig
from .pipeline import run_pipeline
from .records import Completion, Refusal
from .sources.base import Source


__all__ = ["Completion", "GenerateConfig", "Refusal", "Source", "run_pipeline"]
