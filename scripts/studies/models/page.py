"""docs/models.md: tables of families, from the results in docs/results/models/."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from scripts.studies.models.families import DIFFERS, FAILS, HOLDS, NOT_RUN, REFUSED, FamilyResult


DOCS = Path(__file__).parents[3] / "docs"
PAGE, RESULTS = DOCS / "models.md", DOCS / "results" / "models" / "families.json"


@dataclass
class Results:
    """
    What is kept of a whole run.

    Attributes:
        versions (`dict[str, str]`): of the packages.
        families (`list` of [`FamilyResult`]): in alphabetical order.
    """

    versions: dict[str, str]
    families: list[FamilyResult]

    @classmethod
    def of(cls, families: list[FamilyResult]) -> Results:
        return cls({name: version(name) for name in ("torch", "transformers", "trl")}, families)

    @classmethod
    def load(cls, path: Path) -> Results:
        found = json.loads(path.read_text())
        return cls(found["versions"], [FamilyResult(**family) for family in found["families"]])

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    def that(self, outcome: str) -> list[FamilyResult]:
        """The families with an outcome."""
        return [family for family in self.families if family.outcome == outcome]


TEXT = """# Models

Which causal models of transformers can be student and teacher, tried on all {total} families of transformers
{transformers} (TRL {trl}, PyTorch {torch}). This page is made by

<!-- needs: time -->
```console
$ python -m scripts.studies.models.run --write_docs
```

A family is a `model_type` of a configuration, `model.config.model_type`. Of each, tiny random models in fp32 with
scales, soft caps, windows, experts and all kinds of layers are made from a shrunk configuration, and go through the
preflight on a CPU. Then the loss and the gradient of one batch with unequal rows are compared with autograd on full
logits.

**{holds} families hold**: the relative error is {value:.0e} of the loss and {gradient:.0e} of the gradient, at worst.
{refused} are refused before the first step, for the reason given [below](#refused). {fails} fail in another way.

It says that an architecture is computed as transformers computes it. It says nothing about any checkpoint, tokenizer
or size, about quantised weights, or about other devices: what was run there is in
[the README](../README.md#what-works). Remote code (`trust_remote_code`) was not run; the preflight compares the logits
of such a model with those from its hidden states, as for all models.

Vision-language families among them (`gemma3`, `qwen3_5`, ...) read text alone here; with images:
[images.md](images.md).

## Families that hold

- **Padding** on the left: *cut* where it changes nothing, up to the longest prompt of a micro-batch. *Kept* where
  positions are not rotary, although it changes nothing either. *Counts* where it changes logits, for instance through
  absolute positions or a state, so it is kept as the rollouts had it: a row's result depends a little on the prompts
  beside it, in training as in TRL itself.
- **Packed**: with `attn_implementation="flash_attention_2"`, whether rows go through the model without padding. Here a
  stand-in on PyTorch takes the place of the kernels, behind transformers' own code for them, and hidden states are
  those of padded rows, whether the model finds rows by position ids or by their lengths. Where it says *no*, batches
  are padded: slower, and as right.
- **Packed, masked**: with PyTorch's own attention (`"sdpa"`, transformers' default), whether rows may go through the
  model without padding. All tokens are multiplied by all tokens then and most of that is masked, so it is done for
  batches that are mostly padding, where it saves more than it costs.
- **Router**: whether the load-balancing loss of a mixture of experts is added as the model computes it. TRL adds it
  where the configuration has a `router_aux_loss_coef`; where TRL cannot compute it, the run is refused until
  `router_aux_loss_coef=0` is set.

| family | model | padding | packed | packed, masked | router |
|---|---|---|---|---|---|
{rows}

## Refused

Encoders are shown as they are with `is_decoder=True`, without which they are refused as not causal.

| family | reason |
|---|---|
{refusals}
"""


def page(results: Results) -> str:
    """The whole page."""
    assert not results.that(FAILS), "a family fails: mend it, or refuse it in checks/models.py"
    holds = results.that(HOLDS)
    text = TEXT.format(
        **results.versions,
        total=len(results.families),
        holds=len(holds),
        refused=len(results.that(REFUSED)),
        fails="None",
        value=max(family.value_error for family in holds),
        gradient=max(family.gradient_error for family in holds),
        rows=_lines(holds),
        refusals=_lines(results.that(REFUSED)),
    )
    missing = results.that(NOT_RUN)
    return text + (f"\n## Not run\n\n| family | reason |\n|---|---|\n{_lines(missing)}\n" if missing else "")


def _lines(families: Iterable[FamilyResult]) -> str:
    return "\n".join(row(family) for family in families)


PADDING = {"no effect, cut": "cut", "no effect, kept": "kept", "counts, kept": "counts"}
PACKED = {
    "no: the model does not support FlashAttention": "no: no FlashAttention",
    "no: results depend on padding, or positions are not rotary": "no: positions",
    "no: layers with a state": "no: state",
    "no: it reads images, whose tokens may have positions of several dimensions": "no: images",
    DIFFERS: "no: first batch differs",
    "no: its attention is neither FlashAttention nor PyTorch's": "no: no SDPA",
}


def row(result: FamilyResult) -> str:
    """The line of a family in its table; numbers in reasons depend on random weights and are left out."""
    if result.outcome != HOLDS:
        reason = re.sub(r": (its )?log-probabilities .*", "", result.reason.split(". ")[0])
        reason = reason.replace(f" ({result.family})", "").replace("The student's", "its").replace("The student", "it")
        return f"| {result.family} | {reason} |"
    packed, masked = (PACKED.get(found, found) for found in (result.packing, result.masked))
    cells = (result.family, result.model, PADDING[result.padding], packed, masked, result.router.split(":")[0] or "–")
    return f"| {' | '.join(cells)} |"
