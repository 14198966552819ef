"""Settings of the stage that criticises and rewrites completions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..address import Address, parse_address


# none: revisions lie beside the completions, and other principles, models or rounds have a folder of their own
FIXED = ()


@dataclass
class ReviseSettings:
    """
    > Parameters that control the revision of completions (constitutional AI)

    Args:
        revise (`str`, *optional*): a file of principles, or `default` for those that come with this package. Each
            completion is criticised by one of them, drawn by seed, and rewritten; the revision takes its place. With
            `pairs` the revision is the chosen one and the draft the rejected one.
        revise_rounds (`int`, *optional*, defaults to `1`): how often. A round revises what the round before made.
        revise_model (`str`, *optional*): who criticises and rewrites, written like a teacher; each completion's own
            teacher unless given.
        keep_drafts (`bool`, *optional*, defaults to `False`): keep the columns `draft` (the completion before all
            revisions), `critique` and `principle` (lists, one entry for each round that succeeded).
    """

    revise: str | None = field(
        default=None, metadata={"help": "File of principles by which completions are revised, or `default`."}
    )
    revise_rounds: int = field(default=1, metadata={"help": "How often each completion is revised."})
    revise_model: str | None = field(
        default=None, metadata={"help": "Who revises, written like a teacher; each completion's teacher by default."}
    )
    keep_drafts: bool = field(default=False, metadata={"help": "Keep the columns `draft`, `critique` and `principle`."})

    @property
    def revise_address(self) -> Address | None:
        """Where the reviser is, if it is not each completion's own teacher."""
        return parse_address(self.revise_model) if self.revise_model else None

    def revise_faults(self) -> Iterator[str]:
        """What is wrong with these settings."""
        if self.revise_rounds < 1:
            yield f"`revise_rounds` is {self.revise_rounds}; it must be at least 1."
        given = {
            "revise_rounds": self.revise_rounds != 1,
            "revise_model": self.revise_model is not None,
            "keep_drafts": self.keep_drafts,
        }
        if not self.revise and any(given.values()):
            name = next(name for name, is_given in given.items() if is_given)
            yield (
                f"`{name}` is about revisions, but nothing is revised. Add `--revise principles.txt`, or "
                "`--revise default`, or leave it out."
            )
        _ = self.revise_address  # raises an error for an address that cannot be used
