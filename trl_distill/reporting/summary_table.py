"""The last words of a run: a table of where it began and where it ended.

A callback that [`OPDTrainer`] adds where progress is shown (`disable_tqdm` unset), in the main process. Pictures are in
`plots.py`, what the numbers mean in docs/metrics.md.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback


logger = logging.getLogger(__name__)


SHARE = 10  # the first and the last so many-th part of the log are compared


ROWS = {  # label by key of the log
    "reward": "reward",
    "objective": "objective",
    "distill/reverse_kl": "KL(student ‖ teacher), nats per token",
    "distill/forward_kl": "KL(teacher ‖ student), nats per token (of a few)",
    "distill/top1_agreement": "same likeliest token (of a few)",
    "entropy": "entropy, nats",
    "distill/teacher_entropy": "teacher's entropy, nats (of a few)",
    "completions/mean_length": "completion length, tokens",
    "completions/clipped_ratio": "cut completions",
    "distill/repetition": "repetition",
}


def closing_table(log_history: Sequence[dict[str, Any]]) -> Table | None:
    """What was logged at the beginning and at the end, means over a tenth of the log each; `None` without a log."""
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
            Console().print(table)
        except UnicodeEncodeError as error:  # what training ends with must not end it
            logger.warning(f"The closing table cannot be shown in this encoding ({error}). Set PYTHONIOENCODING=utf-8.")
