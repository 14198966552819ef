"""What rewards are compared with where it is not the group: the whole generation batch, or earlier rewards of a prompt.

With both, one completion per prompt is enough. The formula is `mean_of_others` in `objective/weights.py`.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..objective.weights import mean_of_others


logger = logging.getLogger(__name__)


def prompt_keys(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    A key for each prompt: a hash of its token ids, without padding; the same on all processes and in every run.

    Args:
        ids, mask (`torch.Tensor` of shape `(B, P)`): the prompts, padded, and 0 on padding.

    Returns:
        `torch.Tensor` of shape `(B,)`, int64.
    """
    rows = [row[kept].tolist() for row, kept in zip(ids, mask.bool(), strict=True)]
    hashes = [hashlib.blake2b(repr(row).encode(), digest_size=8).digest() for row in rows]
    return torch.tensor([int.from_bytes(found, "big", signed=True) for found in hashes], device=ids.device)


class RewardBaseline:
    """
    Advantages by another baseline than the group's.

    "batch": a reward minus the mean of all other rewards of the generation batch. "prompt": minus the mean of all
    rewards that its prompt has had in this run, and of the others that it has in this batch; where there are none,
    as "batch". A row's own reward stays out of its baseline. Rows without a reward, and a row that has nothing to be
    compared with, get an advantage of 0.

    Every process computes the advantages of all rows, from the same rewards, so all hold the same means.

    Args:
        kind (`str`): "batch" or "prompt".
    """

    FILE = "prompt_rewards.safetensors"  # in a checkpoint

    def __init__(self, kind: str):
        self.kind = kind
        self._seen: dict[int, tuple[float, int]] = {}  # by key: sum and number of the rewards
        self._latest: list[tuple[int, float]] = []  # keys and rewards of the last batch, which are not in it yet
        self.share_known = 0.0  # of the last batch, how many rows had a prompt with earlier rewards

    def advantages(self, rewards: torch.Tensor, keys: torch.Tensor, training: bool = True) -> torch.Tensor:
        """
        Advantages of a generation batch.

        Args:
            rewards (`torch.Tensor` of shape `(R,)`): of all processes; NaN for rows without one.
            keys (`torch.Tensor` of shape `(R,)`, int64): [`prompt_keys`] of all processes.
            training (`bool`): whether these rewards are remembered; in evaluation none is used nor kept.

        Returns:
            `torch.Tensor` of shape `(R,)`.
        """
        device, rewards, keys = rewards.device, rewards.cpu(), keys.cpu()
        baseline = mean_of_others(rewards, torch.zeros_like(keys))
        if self.kind == "prompt":
            known = self._earlier(keys) if training else torch.zeros(2, len(keys), dtype=torch.float64)
            own = mean_of_others(rewards, keys, *known)
            baseline = torch.where(own.isnan(), baseline, own)
            if training:
                self.share_known = (known[1] > 0).double().mean().item()
                pairs = zip(keys.tolist(), rewards.tolist(), strict=True)
                self._latest = [(key, reward) for key, reward in pairs if reward == reward]
        return (rewards - baseline).nan_to_num(nan=0.0).to(device, rewards.dtype)

    def _earlier(self, keys: torch.Tensor) -> torch.Tensor:
        """Sum and number of the rewards that each prompt had in earlier batches, `(2, R)`."""
        for key, reward in self._latest:
            total, count = self._seen.get(key, (0.0, 0))
            self._seen[key] = total + reward, count + 1
        self._latest = []
        found = [self._seen.get(key, (0.0, 0)) for key in keys.tolist()]
        return torch.tensor(found, dtype=torch.float64).view(-1, 2).T

    def save(self, folder: str, under_way: bool) -> None:
        """
        Write the means into a checkpoint folder.

        Args:
            folder (`str`): of the checkpoint.
            under_way (`bool`): whether the last batch is still being trained on; a resumed run generates it again, so
                its rewards are left out.
        """
        if not under_way:
            self._earlier(torch.zeros(0, dtype=torch.int64))
        sums, counts = zip(*self._seen.values(), strict=True) if self._seen else ((), ())
        state = {
            "keys": torch.tensor(list(self._seen), dtype=torch.int64),
            "sums": torch.tensor(sums, dtype=torch.float64),
            "counts": torch.tensor(counts, dtype=torch.int64),
        }
        save_file(state, Path(folder, self.FILE))

    def load(self, folder: str | None) -> None:
        """Continue with the means of a checkpoint, or without any where it has none; a warning says so."""
        self._seen, self._latest = {}, []
        if self.kind != "prompt" or folder is None:
            return
        path = Path(folder, self.FILE)
        if not path.is_file():
            logger.warning(
                f"The checkpoint {folder} has no {self.FILE}: it is from a run without reward_baseline='prompt'. All "
                "prompts count as new."
            )
            return
        keys, sums, counts = (load_file(path)[name].tolist() for name in ("keys", "sums", "counts"))
        self._seen = {key: (total, count) for key, total, count in zip(keys, sums, counts, strict=True)}
