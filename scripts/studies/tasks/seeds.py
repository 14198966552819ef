"""Seeds and sizes that all studies share."""

from __future__ import annotations


HELD_OUT, GLANCE_AT, TRAIN, HUMAN = 10_000, 20_000, 30_000, 50_000  # seeds of problems begin here
