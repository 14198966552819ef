"""The rules of `OPDConfig`: what is refused, and what to write instead. The fields are in `config.py`."""

from __future__ import annotations


KL_ESTIMATORS = ("full", "topk", "sampled")


SCHEDULES = ("constant", "linear", "cosine", "step")
