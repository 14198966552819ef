"""A table at the end of a run that compares its first and last metrics.

A callback that [`OPDTrainer`] adds if progress is shown (`disable_tqdm` is not set), for the main process. The metrics
are explained in docs/metrics.md.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from transformers import TrainerCallback

from .. import foreign_text


logger = logging.getLogger(__name__)


SHARE = 10  # the first and the last tenth of the log are compared


ROWS = {  # labels, by key of the log
    "reward": "reward",
    "objective": "objective",
    "distill/reverse_kl": "KL(student ‖ teacher), nats per token",
    "distill/forward_kl": "KL(teacher ‖ student), nats per token (sample)",
    "distill/top1_agreement": "same most likely token (sample)",
    "entropy": "entropy, nats",
    "distill/teacher_entropy": "teacher's entropy, nats (sample)",
    "completions/mean_length": "completion length, tokens",
    "completions/clipped_ratio": "cut completions",
    "distill/repetition": "repetition",
}


def closing_table(log_history: Sequence[dict[str, Any]]) -> Table | None:
    """Metrics at the beginning and at the end, each averaged over a tenth of the log; `None` without a log."""
    found = {key: [row[key] for row in log_history if row.get(key) is not None] for key in ROWS}
    found = {key: values for key, values in found.items() if values}
    if not found:
        return None
    table = Table(title="Training")
    for label in ("", "first", "last"):
        table.add_column(label, justify="right" if label else "left")
    for key, values in found.items():
        part = max(1, len(values) // SHARE)
        ends = statistics.mean(values[:part]), statistics.mean(values[-part:])
        table.add_row(ROWS[key], *(f"{end:.3g}" for end in ends))
    return table


class SummaryTable(TrainerCallback):
    """Prints [`closing_table`] when training ends."""

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        table = closing_table(state.log_history)
        if not state.is_world_process_zero or table is None:
            return
        try:
            foreign_text.console().print(table)
        except UnicodeEncodeError as error:  # a table that cannot be printed must not fail the run
            logger.warning(
                f"The closing table cannot be printed in this encoding ({error}). Set PYTHONIOENCODING=utf-8."
            )
