"""Settings of the stage that rewrites prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..address import Address, parse_address


FIXED = ("evolve", "evolve_operations", "evolve_model", "evolve_keep", "evolve_check")


EVOLVE_KEEP = ("all", "last")


@dataclass
class EvolveSettings:
    """
    > Parameters that control how prompts are rewritten (Evol-Instruct)

    Args:
        evolve (`int`, *optional*, defaults to `0`): rounds in which prompts are rewritten, new prompts included. A
            round rewrites what the round before made; where that failed, its parent.
        evolve_operations (`list[str]`, *optional*): what is drawn from for each prompt and round: `deeper`,
            `constraints`, `concrete`, `breadth`, `other_words`, or your own text files with `{prompt}` in them. All
            five unless given; a name given twice is drawn twice as often.
        evolve_model (`str`, *optional*): who rewrites, written like a teacher; the first teacher unless given.
        evolve_keep (`str`, *optional*, defaults to `"all"`): what is completed: the original prompts and the rewrites
            of all rounds (`"all"`), or only the last rewrite of each prompt (`"last"`).
        evolve_check (`bool`, *optional*, defaults to `False`): ask the rewriter whether each rewrite can be answered
            as it stands; others are dropped.
    """

    evolve: int = field(default=0, metadata={"help": "Rounds in which prompts are rewritten (Evol-Instruct)."})
    evolve_operations: list[str] | None = field(
        default=None,
        metadata={"help": "`deeper`, `constraints`, `concrete`, `breadth`, `other_words`, or files with `{prompt}`."},
    )
    evolve_model: str | None = field(
        default=None, metadata={"help": "Who rewrites prompts, written like a teacher; the first teacher by default."}
    )
    evolve_keep: str = field(
        default="all", metadata={"help": "Complete originals and rewrites (`all`), or only the `last` rewrites."}
    )
    evolve_check: bool = field(
        default=False, metadata={"help": "Ask the rewriter whether each rewrite can be answered as it stands."}
    )

    @property
    def evolve_address(self) -> Address | None:
        """Where the rewriter is, if it is not the first teacher."""
        return parse_address(self.evolve_model) if self.evolve_model else None

    def evolve_faults(self) -> Iterator[str]:
        """What is wrong with these settings."""
        if self.evolve < 0:
            yield f"`evolve` is {self.evolve}; it is a number of rounds. Write 0 to leave prompts as they are."
        if self.evolve_keep not in EVOLVE_KEEP:
            choices = ", ".join(map(repr, EVOLVE_KEEP))
            yield f"`evolve_keep={self.evolve_keep!r}` is not known. Choose one of {choices}."
        if self.evolve_operations is not None and not self.evolve_operations:
            yield "`evolve_operations` is empty. Name an operation, such as `deeper`, or leave it out to use all."
        changed = [name for name in FIXED if name != "evolve" and getattr(self, name) != _DEFAULTS[name]]
        if not self.evolve and changed:
            yield f"`{changed[0]}` says how prompts are rewritten, but none is. Add `--evolve 1`, or leave it out."
        _ = self.evolve_address  # raises an error for an address that cannot be used


_DEFAULTS = {"evolve_operations": None, "evolve_model": None, "evolve_keep": "all", "evolve_check": False}
