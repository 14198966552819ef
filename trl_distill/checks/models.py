"""Checks of models: text only, logits, saving, context length, and whether the teacher differs from the student."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from ..models.properties import backbone_of, reads_images
from .findings import Finding


_DRAFT = "it drafts tokens from the states of another model, and computes nothing alone"
_CODEBOOKS = "its tokens are codes of sound, several at a time"


UNSUITABLE = {  # by `model_type`: causal models for transformers, but none that can be distilled here
    "blt": "transformers does not generate with it",
    "gemma4_assistant": _DRAFT,
    "gemma4_unified_assistant": _DRAFT,
    "musicgen": _CODEBOOKS,
    "musicgen_melody": _CODEBOOKS,
    "reformer": "its buckets of attention are drawn at random, and rows must have one length in training",
}


def check_architecture(config: PretrainedConfig, whose: str) -> None:
    """Raise `ValueError` for models that cannot be student or teacher."""
    reason = UNSUITABLE.get(config.model_type)
    if reason is not None:
        raise ValueError(f"The {whose} ({config.model_type}) cannot be distilled: {reason}. Use a text model.")
    if reads_images(config) and config.is_encoder_decoder:
        raise ValueError(
            f"The {whose} ({config.model_type}) is an encoder and a decoder, and does not continue its prompt. Use a "
            "vision-language model with a decoder alone, such as Qwen-VL, Gemma 3 or LLaVA."
        )


def check_logits(expected: torch.Tensor, computed: torch.Tensor, whose: str) -> None:
    """
    Check that the logits computed from hidden states are those of the model itself.

    Args:
        expected (`torch.Tensor` of shape `(..., V)`): the model's logits for a few tokens.
        computed (`torch.Tensor` of shape `(..., V)`): ours, from its last hidden state and head.
        whose (`str`): "student" or "teacher".

    Raises:
        ValueError: they are not finite, or differ by more than rounding.
    """
    if expected.shape != computed.shape:
        raise ValueError(
            f"The {whose}'s logits are of {expected.shape[-1]} ids, but its LM head has {computed.shape[-1]} rows: its "
            "architecture leaves some out after the projection, so the divergence would be that of another "
            "distribution. Use another model."
        )
    _check_finite(expected, f"The {whose}'s logits are")
    _check_finite(computed, f"The {whose}'s logits, computed from its last hidden state and LM head, are")
    expected, computed = expected.float().log_softmax(-1), computed.float().log_softmax(-1)
    difference, spread = (expected - computed).abs().mean().item(), expected.std().item()
    if not difference < 0.02 + 0.05 * spread:  # bf16 rounding is below it, a missing scale far above; NaN fails too
        raise ValueError(
            f"The {whose}'s logits do not follow from its last hidden state and LM head: log-probabilities differ by "
            f"{difference:.3g} nats on average. Its architecture transforms them in a way that this version does not "
            "know, so the divergence would be that of another distribution. Use another model."
        )


def check_width(hidden: int, head: int, whose: str) -> None:
    """Raise `ValueError` if the last hidden state does not have the width that the LM head takes."""
    if hidden != head:
        raise ValueError(
            f"The {whose}'s LM head takes {head} values, but its last hidden state has {hidden}: there are further "
            "layers between the two, which this version does not know. Use another model."
        )


def check_causal(logits: torch.Tensor, whose: str) -> None:
    """
    Check that logits depend on no token that comes later.

    Args:
        logits (`torch.Tensor` of shape `(2, T, V)`): the model's at the same tokens of two sequences that go on
            differently.
        whose (`str`): "student" or "teacher".

    Raises:
        ValueError: they differ by more than rounding.
    """
    one, other = logits.float().log_softmax(-1)
    difference = (one - other).abs().mean().item()
    if difference > 0.002 + 0.01 * one.std().item():  # two rows of one batch are rounded the same way, or nearly so
        raise ValueError(
            f"The {whose} is not causal: its log-probabilities change by {difference:.2g} nats on average with the "
            "tokens that come later, so they are no probabilities of a next token. Load an encoder with "
            "`is_decoder=True` in its configuration, or use a causal language model."
        )


def check_router_loss(model: Any) -> None:
    """
    Check that TRL can compute the load-balancing loss of a mixture of experts, where its coefficient is not 0.

    Raises:
        ValueError: the model returns no router logits, or its configuration names its experts in another way.
    """
    config, device = model.config.get_text_config(), next(model.parameters()).device
    with torch.no_grad():
        output = backbone_of(model)(input_ids=torch.arange(4, device=device)[None], output_router_logits=True)
    router = getattr(output, "router_logits", None)
    named = getattr(config, "num_experts", None) and getattr(config, "num_experts_per_tok", None)
    if router and named:
        return
    reason = "its configuration has no `num_experts`" if router else "it returns no router logits"
    coefficient = getattr(config, "router_aux_loss_coef", 0)
    raise ValueError(
        f"The load-balancing loss of {type(model).__name__} cannot be computed ({reason}), but it is asked for "
        f"(`router_aux_loss_coef` is {coefficient} in its configuration). Set `router_aux_loss_coef=0`."
    )


def _check_finite(logits: torch.Tensor, subject: str) -> None:
    """Raise `ValueError` with the ids whose logits are NaN or infinite; `subject` begins the message."""
    wrong = (~logits.isfinite()).reshape(-1, logits.shape[-1]).any(0)  # (V,)
    if not wrong.any():
        return
    ids, first = wrong.nonzero().flatten(), ", ".join(map(str, wrong.nonzero().flatten()[:5].tolist()))
    values = logits[~logits.isfinite()]
    kind = next(name for name, found in _KINDS.items() if found(values).any())
    where = f"{subject} {kind} for {len(ids)} of {len(wrong)} ids (the first: {first})"
    if kind == "−inf":
        raise ValueError(
            f"{where}. The divergence from or to a probability of exactly 0 is infinite or NaN. Such values are used "
            "to mask padding ids, often in the LM head's bias: replace them by a large negative number, such as -1e4 "
            "(`model.lm_head.bias.data.clamp_(min=-1e4)`), and save the model."
        )
    raise ValueError(
        f"{where}. Its weights are broken, or overflow in their dtype. Load it in bf16 or fp32 (`dtype`), or fetch the "
        "checkpoint again."
    )


_KINDS = {"NaN": torch.isnan, "+inf": torch.isposinf, "−inf": torch.isneginf}


def saveable(student: Any, adapter: bool) -> Finding:
    """
    Whether the trained student can be saved: weights in a format that transformers only reads cannot.

    Args:
        student: the student without its adapter, or its name, of which nothing is known.
        adapter (`bool`): whether only an adapter is trained, which is saved alone.
    """
    quantizer: Any = getattr(student, "hf_quantizer", None)
    if quantizer is None or adapter or quantizer.is_serializable():
        return Finding("saving", "ok", "Only the adapter is saved." if adapter else "The student can be saved.")
    method = quantizer.quantization_config.quant_method
    return cannot_be_saved(str(getattr(method, "value", method)).upper())


def cannot_be_saved(name: str) -> Finding:
    """What to say of a student whose weights are in the format `name`, which is only read."""
    return Finding(
        "saving",
        "error",
        f"The student's weights were loaded from {name}, which transformers can read but not save: the run would end "
        "without a model.",
        "Convert it once and train the result: load it, give its weights to a model without `quantization_config` "
        "(`AutoModelForCausalLM.from_config(config)`, then `load_state_dict`), and `save_pretrained` that; or take the "
        "original checkpoint, or train an adapter (`peft_config`).",
    )


def context_length(
    longest_prompt: int, completion: int, context: int | None, whose: str, counted: str = "", where: str = ""
) -> Finding:
    """
    Whether the longest prompt plus a completion fits into a model's context.

    Args:
        longest_prompt (`int`): tokens of the longest prompt.
        completion (`int`): longest completion in tokens.
        context (`int`, *optional*): the model's context; `None` or -1 if unknown.
        whose (`str`): "student" or "teacher".
        counted (`str`): which prompts were counted.
        where (`str`): which of them is the longest.
    """
    check = f"context, {whose}"
    known = context is not None and context > 0  # some configurations have -1
    if context is None or not known or longest_prompt + completion <= context:
        limit = f"{context} positions" if known else "no limit known"
        return Finding(
            check,
            "ok",
            f"Prompts have up to {longest_prompt} tokens, completions up to {completion}; {limit}."
            + (f" Counted: {counted}." if counted else ""),
        )
    which = f"The longest prompt ({where})" if where else "The longest prompt"
    return Finding(
        check,
        "error",
        f"{which} has {longest_prompt} tokens and completions up to {completion}, but the {whose} has {context} "
        "positions.",
        f"Lower `max_completion_length` to {context - longest_prompt}, or drop the longest prompts."
        if longest_prompt < context
        else f"The prompt alone does not fit: drop such prompts, or use a {whose} with more positions.",
    )


class Distance(NamedTuple):
    """
    How far the student is from a teacher, over some judged tokens.

    Attributes:
        kl (`float`): KL(student ‖ teacher) in nats per token.
        uniform (`float`): KL(student ‖ uniform) on the same tokens, that is, from a teacher that knows nothing.
        tokens (`int`): number of tokens.
        completions (`int`): number of completions that they are from.
        whose (`str`): who wrote these.
    """

    kl: float
    uniform: float
    tokens: int
    completions: int
    whose: str = "of the student's own"

    def __str__(self) -> str:
        of = f"the first {self.tokens} tokens of {self.completions} completions {self.whose}"
        return f"KL(student ‖ teacher) is {self.kl:.3g} nats per token on {of}"


SCALE = (  # docs/teachers.md says where this was measured
    "For scale, from small models: 0.5 to 1.4 with student and teacher of the same kind, about 4 after a third of the "
    "student's layers was removed, {uniform:.2g} (of this student) from a teacher that gives every token the same "
    "probability."
)


def teacher_differs(
    found: Distance,
    explained: str,
    override: bool,
    name: str = "",
    own: bool = False,
    rough: bool = False,
    known: bool = True,
) -> Finding:
    """
    Whether there is something to learn, and from how far, by KL(student ‖ teacher) on the student's own completions.

    Args:
        found ([`Distance`]): as measured.
        explained (`str`): why the two may start equal, such as "there is a reward"; empty if nothing explains it.
        override (`bool`): `assume_different_teacher`.
        name (`str`): name of this teacher, if there are several.
        own (`bool`): whether the teacher is the student itself, without its adapter or as a moving average.
        rough (`bool`): whether probabilities are computed in 16 bits, where rounding looks like a small KL.
        known (`bool`): whether the prompts are those of training, so that the distance is worth comparing.
    """
    check = f"teacher differs, {name}" if name else "teacher differs"
    if SAME_MODEL_KL < found.kl < ROUNDING_KL and rough and not (explained or override):
        return Finding(
            check,
            "warning",
            f"{found}. So little may be rounding.",
            "Make sure that the teacher is not the student under another name.",
        )
    if found.kl > SAME_MODEL_KL and not known:
        return Finding(check, "ok", f"{found}, after a made-up prompt, since prompts are unknown: they differ.")
    if found.kl > max(found.uniform, ROUNDING_KL):
        return Finding(
            check,
            "warning",
            f"{found}, further than from a teacher that gives every token the same probability ({found.uniform:.2g}).",
            "Such a teacher has not seen text like this: check that ids, chat template and checkpoint are the right "
            "ones. With an untrained student it is to be expected.",
        )
    if found.kl > SAME_MODEL_KL:
        return Finding(check, "ok", f"{found}. {SCALE.format(uniform=found.uniform)}")
    who = f"The student and the teacher {name!r}" if name else "Student and teacher"
    same = f"{who} give the same probabilities (KL {found.kl:.1g} nats per token of the student's own completions)."
    return _equal(check, same, explained, override, own)


def _equal(check: str, same: str, explained: str, override: bool, own: bool) -> Finding:
    """What it means that student and teacher start equal; arguments as in [`teacher_differs`]."""
    if own and explained:
        return Finding(check, "ok", f"They start equal, as expected: {explained}.")
    if explained or override:
        return Finding(check, "warning", f"{same} Continuing: {explained or '`assume_different_teacher=True`'}.")
    if own:
        return Finding(
            check,
            "error",
            f"{same} The teacher is the student itself, so there is nothing to learn.",
            "Give it prompts of its own (a `teacher_prompt` column) or a reward, start from a trained "
            "adapter, or set `assume_different_teacher=True`.",
        )
    return Finding(
        check,
        "error",
        f"{same} The teacher's weights are those of the student, so there is nothing to learn.",
        "Check the two paths. If this is intended, give the teacher its own prompts (a `teacher_prompt` column) or a "
        "reward, or set `assume_different_teacher=True`.",
    )


ROUNDING_KL = 1e-3  # nats per token; with equal weights in 16 bits, rounding gives a few times 1e-4


SAME_MODEL_KL = 1e-6  # nats per token; fp32 rounding is below it, the effect of any training step above
