"""What holds for one family of causal models: logits, loss and gradient, padding, packed rows, the loss of a router.

A tiny random student and teacher of the family go through the preflight; then one batch is compared with autograd on
full logits of the models as they were.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from scripts.studies.benchmark.cells import make_tokenizer
from scripts.studies.models.flash_stand_in import IMPLEMENTATION, stand_in
from scripts.studies.models.tiny import NOT_TRIED, PAD, VOCAB, configuration, tiny_model
from trl_distill import OPDConfig, OPDTrainer
from trl_distill.checks.models import check_architecture
from trl_distill.models import packing
from trl_distill.models.hidden_states import last_hidden
from trl_distill.models.properties import backbone_of
from trl_distill.training.micro_batches import trimmed


CLOSE = 1e-4  # relative error in fp32 up to which two results are the same
LONGER = 12  # times the rows of the comparison, to try rows packed under a mask
DIFFERS = "no: rows would see each other (found on the first batch)"
HOLDS, REFUSED, NOT_RUN, FAILS = "holds", "refused", "not run", "fails"


@dataclass
class FamilyResult:
    """
    What was found for one family.

    Attributes:
        family (`str`): `model_type` of the configuration.
        outcome (`str`): "holds", "refused" (by a message before the first step), "not run" or "fails".
        reason (`str`): why, if it does not hold.
        model (`str`): class of the model.
        value_error, gradient_error (`float`): of loss and gradient, relative to those of full logits.
        padding (`str`): what padding on the left does.
        packing, masked (`str`): whether rows are packed with FlashAttention and with PyTorch's, or why not.
        router (`str`): whether the load-balancing loss can be computed; empty if there is none.
        seconds (`float`): that it took.
    """

    family: str
    outcome: str
    reason: str = ""
    model: str = ""
    value_error: float = 0.0
    gradient_error: float = 0.0
    padding: str = ""
    packing: str = ""
    masked: str = ""
    router: str = ""
    seconds: float = 0.0


class NotRun(Exception):
    """The family cannot be run here; the message says why."""


def probe(family: str) -> FamilyResult:
    """Everything that is checked of one family."""
    start, result = time.perf_counter(), FamilyResult(family, NOT_RUN)
    try:
        _probe(family, result)
    except NotRun as reason:
        result.outcome, result.reason = NOT_RUN, str(reason)
    result.seconds = time.perf_counter() - start
    return result


def _probe(family: str, result: FamilyResult) -> None:
    make = models_of(family, result)
    if make is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer = trainer_of(make, folder, result)
        except ValueError as refusal:
            result.outcome, result.reason = REFUSED, str(refusal)
            return
        inputs = batch()
        compare(trainer, make, inputs, result)
    left_padding(make(1), trainer.trims_prompts, result)
    result.packing = packed_rows(family, make, inputs)
    result.masked = masked_rows(make, inputs)
    for found in (result.packing, result.masked, result.router):
        if found.startswith("WRONG"):
            result.outcome, result.reason = FAILS, found


def models_of(family: str, result: FamilyResult) -> Any:
    """A function from seeds to models; `None` if the configuration is refused."""
    if family in NOT_TRIED:
        raise NotRun(NOT_TRIED[family])
    config = configuration(family)
    try:
        check_architecture(config, "student")
    except ValueError as refusal:
        result.outcome, result.reason = REFUSED, str(refusal)
        return None
    make = functools.partial(_fresh, config)
    try:
        result.model = type(make(1)).__name__
    except ImportError as error:
        raise NotRun(str(error).strip().splitlines()[0]) from error
    return make


def _fresh(config: Any, seed: int, **how: Any) -> Any:
    return tiny_model(copy.deepcopy(config), seed, **how)


@functools.cache
def tokenizer() -> Any:
    return make_tokenizer(VOCAB)


def trainer_of(make: Any, folder: str, result: FamilyResult) -> OPDTrainer:
    """A trainer in the state of a training step. The load-balancing loss is left out, after it was tried."""

    def trainer(**changes: Any) -> OPDTrainer:
        made = OPDTrainer(
            model=make(1),
            teacher_model=make(2),
            args=settings(folder, **changes),
            train_dataset=Dataset.from_dict({"prompt": ["w3 w4 w5", "w6 w7"] * 2}),
            processing_class=tokenizer(),
        )
        made.model.train()
        made.current_gradient_accumulation_steps = 1
        return made

    try:
        found = trainer()
        if not found.aux_loss_enabled:
            return found
        result.router = router_loss(found, make, batch())
    except ValueError as refusal:
        if "router_aux_loss_coef" not in str(refusal):
            raise
        result.router = "refused: `router_aux_loss_coef=0` is needed"
    return trainer(router_aux_loss_coef=0.0)


def router_loss(trainer: OPDTrainer, make: Any, inputs: dict[str, torch.Tensor]) -> str:
    """Whether the load-balancing loss is added to the teacher's term as the model itself computes it."""
    found = trainer.rollout_loss(trainer.model, trimmed(inputs, trainer.trims_prompts)).detach()
    student, (ids, attended) = make(1).train(), whole(inputs)
    with torch.no_grad():
        own = student(input_ids=ids, attention_mask=attended, use_cache=False, output_router_logits=True).aux_loss
        expected = loss_of_full_logits(student, make(2), inputs) + trainer.router_aux_loss_coef * own
    wrong = not relative(found, expected) <= CLOSE
    return f"WRONG: off by {relative(found, expected):.1g}" if wrong else "yes"


def settings(folder: str, **changes: Any) -> OPDConfig:
    return OPDConfig(
        output_dir=folder,
        per_device_train_batch_size=4,
        max_completion_length=8,
        max_steps=1,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        **changes,
    )


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Four rows as GRPOTrainer makes them, with columns that are padding in every row on both sides."""
    generator = torch.Generator().manual_seed(seed)
    prompts, completions = torch.tensor([4, 1, 2, 3]), torch.tensor([2, 6, 1, 4])
    prompt_mask = (torch.arange(7) >= 7 - prompts[:, None]).long()
    completion_mask = (torch.arange(8) < completions[:, None]).long()
    ids = torch.randint(3, VOCAB, (4, 15), generator=generator)
    return {
        "prompt_ids": ids[:, :7].masked_fill(prompt_mask == 0, PAD),
        "prompt_mask": prompt_mask,
        "completion_ids": ids[:, 7:].masked_fill(completion_mask == 0, PAD),
        "completion_mask": completion_mask,
        "advantages": torch.zeros(4),
        "num_items_in_batch": completion_mask.sum(),
    }


def compare(trainer: OPDTrainer, make: Any, inputs: dict[str, torch.Tensor], result: FamilyResult) -> None:
    """Loss and gradient of the trimmed batch beside those from full logits of the whole one."""
    loss = trainer.rollout_loss(trainer.model, trimmed(inputs, trainer.trims_prompts))
    loss.backward()
    student = make(1).train()
    expected = loss_of_full_logits(student, make(2), inputs)
    expected.backward()
    result.value_error = relative(loss.detach(), expected.detach())
    result.gradient_error = relative(gradient(trainer.model), gradient(student))
    right = result.value_error <= CLOSE and result.gradient_error <= CLOSE  # NaN is wrong, too
    result.outcome = HOLDS if right else FAILS
    if not right:
        result.reason = f"loss off by {result.value_error:.1g}, gradient by {result.gradient_error:.1g}"


def loss_of_full_logits(student: Any, teacher: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean reverse KL over the completion tokens."""
    ids, attended = whole(inputs)
    length, mask = inputs["completion_ids"].shape[1], inputs["completion_mask"]
    logits = student(input_ids=ids, attention_mask=attended, use_cache=False).logits.double()
    with torch.no_grad():
        of_teacher = teacher(input_ids=ids, attention_mask=attended, use_cache=False).logits.double()
    log_q, log_p = (one[:, -length - 1 : -1].log_softmax(-1) for one in (logits, of_teacher))
    return ((log_q.exp() * (log_q - log_p)).sum(-1) * mask).sum() / mask.sum()


def whole(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask `(B, T)` of prompts and completions."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    return ids, torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)


@torch.no_grad()
def left_padding(model: Any, trims: bool, result: FamilyResult) -> None:
    """Whether a row alone and the same row after padding have the same logits, as is assumed where padding is cut."""
    ids = torch.randint(3, VOCAB, (1, 10), generator=torch.Generator().manual_seed(1))
    alone = model(input_ids=ids, use_cache=False).logits
    padded = torch.nn.functional.pad(ids, (60, 0), value=PAD)
    attended = torch.nn.functional.pad(torch.ones_like(ids), (60, 0))
    after = model(input_ids=padded, attention_mask=attended, use_cache=False).logits[:, 60:]
    counts = relative(after, alone) > CLOSE
    result.padding = "counts, kept" if counts else "no effect, cut" if trims else "no effect, kept"
    if counts and trims:
        result.outcome, result.reason = FAILS, f"padding is cut, but changes logits by {relative(after, alone):.1g}"


@torch.no_grad()
def packed_rows(family: str, make: Any, inputs: dict[str, torch.Tensor]) -> str:
    """Whether rows are packed with FlashAttention; where they are, they are right by position ids and by lengths."""
    plain = make(1)
    if not plain._supports_flash_attn:
        return "no: the model does not support FlashAttention"
    ids, attended = whole(inputs)
    kept = attended.bool()
    expected = backbone_of(plain)(input_ids=ids, attention_mask=attended, use_cache=False).last_hidden_state[kept]
    with stand_in(type(plain)):
        try:
            model = make(1, attn_implementation=IMPLEMENTATION)
        except (ImportError, ValueError) as error:
            return "no: " + str(error).strip().splitlines()[0].split(": ")[0]
        model.load_state_dict(plain.state_dict())
        if packing.obstacle(model):
            return f"no: {packing.obstacle(model)}"
        found = last_hidden(model, input_ids=ids, attention_mask=attended)[kept]
        if relative(found, expected) > CLOSE:
            return f"WRONG: hidden states of packed rows are off by {relative(found, expected):.1g}"
        if not packing.is_exact(model, ids, attended):
            return DIFFERS
        backbone = backbone_of(model)
        by_length = packing.packed_hidden(backbone, ids, attended, packing.row_lengths(backbone, kept))[kept]
    wrong = relative(by_length, expected) > CLOSE
    return f"WRONG: by lengths, off by {relative(by_length, expected):.1g}" if wrong else "yes"


@torch.no_grad()
def masked_rows(make: Any, inputs: dict[str, torch.Tensor]) -> str:
    """Whether rows are packed with PyTorch's attention, where that is worth it; where they are, they are right."""
    model = make(1)
    if packing.obstacle(model):
        return f"no: {packing.obstacle(model)}"
    backbone, (ids, attended) = backbone_of(model), whole(inputs)
    if not packing.is_exact(model, ids, attended):
        return DIFFERS
    ids = ids.repeat(1, LONGER)  # beyond the tokens of the trial
    starts = torch.arange(len(ids))[:, None] * ids.shape[1] // len(ids)
    attended = (torch.arange(ids.shape[1]) >= starts).long()
    kept = attended.bool()
    expected = backbone(input_ids=ids, attention_mask=attended, use_cache=False).last_hidden_state[kept]
    for lengths in ({}, packing.row_lengths(backbone, kept)):  # as on a CPU, and on accelerators
        found = packing.packed_hidden(backbone, ids, attended, lengths)[kept]
        if relative(found, expected) > CLOSE:
            return f"WRONG: masked, off by {relative(found, expected):.1g}"
    return "yes"


def gradient(model: torch.nn.Module) -> torch.Tensor:
    """All gradients as one vector, zeros where there is none."""
    return torch.cat(
        [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten().double() for p in model.parameters()]
    )


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative difference of two tensors."""
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()
