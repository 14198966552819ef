"""The weights of a micro-batch's tokens: what was measured goes to the weighting, and its statistics are kept.

Statistics are of the last optimizer step, over all processes, so that weights do not depend on how a step is split.
They are saved with checkpoints. The weightings themselves are in `objective/weighting.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..estimators.base import TokenMeasures
from ..objective.weighting import BINS, PreviousStep, TokenWeighting, tally
from ..rollouts import MicroBatch
from ..signals import TeacherScore, TokenLogProbs


FIELDS = {"divergence": "divergence", "student_entropy": "entropy"}  # of `TokenMeasures`, where it has another name
OF_LOCAL_TEACHERS = ("teacher_entropy", "agreement")


class RunningStatistics:
    """Tallies of this optimizer step and of the one before, for one kind of batch."""

    def __init__(self) -> None:
        self.step = -1
        self.current: dict[str, torch.Tensor] = {}
        self.previous: dict[str, torch.Tensor] = {}

    def at(self, step: int) -> PreviousStep | None:
        """The statistics of the last step before `step` that had any; `None` if there is none."""
        if step != self.step and self.current:
            self.previous, self.current = self.current, {}
        self.step = step
        return PreviousStep(self.previous) if self.previous else None

    def add(self, tallies: dict[str, torch.Tensor]) -> None:
        for name, one in tallies.items():
            self.current[name] = self.current[name] + one if name in self.current else one

    def state(self) -> dict[str, Any]:
        parts = {"current": self.current, "previous": self.previous}
        return {
            "step": self.step,
            **{part: {name: one.tolist() for name, one in found.items()} for part, found in parts.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.current, self.previous = (
            {name: torch.tensor(one, dtype=torch.float64) for name, one in state[part].items()}
            for part in ("current", "previous")
        )


class LossWeighting:
    """
    Token weights for a run's loss.

    Args:
        weighting ([`~trl_distill.objective.weighting.TokenWeighting`]): the weighting.
        accelerator ([`~accelerate.Accelerator`]): adds up statistics over all processes.
        teachers (`dict` of [`~trl_distill.Teacher`]): checked against what the weighting needs.

    Raises:
        ValueError: a teacher does not give what the weighting needs.
    """

    FILE = "token_weighting.json"  # in a checkpoint

    def __init__(self, weighting: TokenWeighting, accelerator: Any, teachers: dict[str, Any]):
        self.weighting, self.accelerator = weighting, accelerator
        self.kept = {"rollouts": RunningStatistics(), "dataset": RunningStatistics()}
        needed = [name for name in OF_LOCAL_TEACHERS if name in weighting.needs]
        for who, teacher in teachers.items():
            if needed and issubclass(teacher.gives, TokenLogProbs):
                raise ValueError(
                    f"The token weighting {weighting.name!r} needs `{needed[0]}`, which takes the teacher's whole "
                    f"distribution, but the teacher {who!r} gives log-probabilities of a few ids only. Use a local "
                    "teacher, or a weighting by `student_entropy` or `position`."
                )

    def known_ahead(self, mask: torch.Tensor) -> torch.Tensor | None:
        """Weights `(B, C)` that are known before the forward pass, else `None`."""
        if not self.weighting.known_ahead:
            return None
        return self.weighting(position=_position(mask), mask=mask).masked_fill(~mask, 0.0)

    def __call__(
        self,
        measures: list[TokenMeasures],
        scores: list[TeacherScore],
        batch: MicroBatch,
        step: int,
        training: bool,
    ) -> torch.Tensor:
        """
        The weight of each token, `(B, C)`, without gradient; 0 at tokens that are not judged.

        Every process calls it for each micro-batch.

        Args:
            measures (`list` of [`~trl_distill.estimators.base.TokenMeasures`]): for each score, `(B, C)`.
            scores (`list` of [`~trl_distill.signals.TeacherScore`]): the teachers' scores.
            batch ([`~trl_distill.rollouts.MicroBatch`]): the micro-batch.
            step (`int`): optimizer steps made.
            training (`bool`): whether its tokens count in the statistics.
        """
        mask, weighting = batch.mask, self.weighting
        arguments: dict[str, Any] = {"position": _position(mask), "mask": mask}
        scored = torch.zeros_like(mask)
        for score in scores:
            scored |= score.mask
        for name in weighting.needs - {"position", "mask", "previous"}:
            arguments[name] = _averaged(FIELDS.get(name, name), measures, scores, mask)
        if weighting.counted:
            statistics = self.kept["dataset" if batch.is_off_policy else "rollouts"]
            arguments["previous"] = statistics.at(step)
            if training:
                statistics.add(self._counted({name: arguments[name][scored] for name in weighting.counted}))
        return weighting(**arguments).masked_fill(~mask, 0.0)

    def _counted(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tallies over all processes, by one reduction."""
        tallies = torch.stack([tally(one) for one in values.values()])
        summed = self.accelerator.reduce(tallies, reduction="sum").double().cpu().view(-1, 1 + BINS)
        return dict(zip(values, summed, strict=True))

    def save(self, folder: str) -> None:
        """Write the statistics into a checkpoint."""
        state = {name: one.state() for name, one in self.kept.items()}
        Path(folder, self.FILE).write_text(json.dumps(state))

    def load(self, folder: str | None) -> None:
        """Continue from a checkpoint; without the file, begin anew."""
        path = Path(folder or "", self.FILE)
        if folder and path.is_file():
            for name, state in json.loads(path.read_text()).items():
                self.kept[name].load(state)


def _position(mask: torch.Tensor) -> torch.Tensor:
    """The number of judged tokens before each token, `(B, C)`, int64; 0 at tokens that are not judged."""
    return (mask.long().cumsum(1) - 1).masked_fill(~mask, 0)


def _averaged(
    field: str, measures: list[TokenMeasures], scores: list[TeacherScore], mask: torch.Tensor
) -> torch.Tensor:
    """
    A measure `(B, C)`, without gradient, averaged over the teachers by their weights.

    So a token has one weight for all teachers, and what they are mixed to stays the target.
    """
    total = torch.zeros(mask.shape, device=mask.device)
    weights = torch.zeros_like(total)
    for found, score in zip(measures, scores, strict=True):
        value = getattr(found, field)
        assert value is not None, field
        share = score.weight[:, None] * score.mask
        total = total + share * value.detach()
        weights = weights + share
    return torch.where(weights == 0, total, total / weights.masked_fill(weights == 0, 1.0))
