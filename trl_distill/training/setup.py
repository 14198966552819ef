"""Setup before the first step: check student and teachers against each other, load the teachers, make the estimators.

The checks themselves are in `trl_distill.checks`; the training steps are in `trainer.py`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from accelerate.utils import is_peft_model
from torch import nn

from ..checks.findings import Finding, Report
from ..checks.loaded import ModelChecks, check_head
from ..checks.models import check_router_loss
from ..checks.preflight import Examined, OtherTokenizer, RunFacts, examine
from ..checks.teachers import check_signals
from ..config import OPDConfig
from ..data.images import encode
from ..data.rewards import checked_reward
from ..data.sampling import prompts_ids
from ..estimators import make_estimator
from ..estimators.base import Estimator
from ..estimators.cross_tokenizer import ByTokenizer, ClosedIds, CrossTokenizer
from ..heads.fused import DivergenceSpec
from ..images import EncodedPrompt
from ..models.properties import has_relative_positions, name_of, unwrap_adapter
from ..models.student import add_student_forward, keep_output_dtype
from ..objective.weighting import measured_for
from ..reporting.summary_table import SummaryTable
from ..reporting.trackers import add_trackers
from ..teachers.base import Teacher, is_sharded
from ..teachers.cross_tokenizer import reader_of, shared_ids
from ..teachers.pool import TeacherPool
from ..teachers.spec import TeacherSpec, load_pool
from .objective_record import ObjectiveRecord, objective_of


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """
    Teachers and estimators of a run.

    Attributes:
        pool ([`~trl_distill.teachers.pool.TeacherPool`]): the teachers.
        estimator ([`~trl_distill.estimators.base.Estimator`]): for rollouts of the student.
        off_policy_estimator ([`~trl_distill.estimators.base.Estimator`]): for the dataset's completions.
        same_vocabulary (`bool`): whether the divergence covers all of the student's ids.
        checks ([`~trl_distill.checks.loaded.ModelChecks`]): some are made on the first rollouts if weights are sharded.
        readers (`dict`): tokenizers of teachers that have another than the student, by the columns of their prompts.
        encoders (`dict` of `Callable`): by these columns, and by those of teachers with another processor, what turns
            prompts and their rows' `tools=` into what such a teacher reads.
        blind (`dict`): what to say of teachers that see no images, by name, should there be one after all.
    """

    pool: TeacherPool
    estimator: Estimator
    off_policy_estimator: Estimator
    same_vocabulary: bool
    checks: ModelChecks
    readers: dict[str, Any] = field(default_factory=dict)
    encoders: dict[str, Callable[..., list[EncodedPrompt]]] = field(default_factory=dict)
    blind: dict[str, Finding] = field(default_factory=dict)


def prepare(trainer: Any, specs: dict[str, TeacherSpec], report: Report) -> Setup:
    """
    Check that teachers and student fit, load the teachers, and extend the student's forward pass.

    Args:
        trainer ([`~trl_distill.OPDTrainer`]): after TRL's own set-up.
        specs (`dict[str, TeacherSpec]`): the teachers by name.
        report ([`~trl_distill.checks.findings.Report`]): collects the findings.

    Raises:
        ValueError: something does not fit. Errors that the preflight collects are raised together as `PreflightError`.
    """
    trainer.is_distilling = True
    trainer.reward_funcs = [checked_reward(function) for function in trainer.reward_funcs]
    objective = objective_of(trainer.args, trainer.facts["teachers"], trainer.facts["reward_funcs"])
    trainer.add_callback(ObjectiveRecord(objective))
    facts = facts_of(trainer)
    found = examine(facts, specs, report)
    same_vocabulary = _stay_inside_vocabulary(trainer, found.vocab_size)
    if found.merged:
        _stop_at(trainer, sorted({*found.merged, *trainer.eos_token_ids}))
    estimator, off_policy_estimator = _estimators(trainer, found, len({spec.identity for spec in specs.values()}))
    if not (trainer.has_rewards or trainer.has_side_terms or estimator.needs_log_probs or trainer.args.kl_discount > 0):
        trainer.skip_old_log_probs()
    placed = getattr(facts.student, "is_quantized", False) or getattr(facts.student, "hf_device_map", None)
    if trainer.is_deepspeed_enabled and not trainer.zero3 and not placed:
        trainer.model.to(trainer.accelerator.device)  # DeepSpeed would later; the checks call it now
    add_student_forward(facts.student, fp32_head=trainer.args.cast_lm_head_to_fp32)
    keep_output_dtype(trainer.accelerator)
    if not is_sharded(trainer.accelerator):
        check_head(facts.student, "student", trainer.accelerator)
        if trainer.aux_loss_enabled:
            check_router_loss(facts.student)
    pool = _load(trainer, specs, estimator, found)
    for teacher, columns in pool.members:
        if pool.several:
            teacher.call_it(pool.names[columns[0]])
        for callback in teacher.callbacks():
            trainer.add_callback(callback)
        teacher.check()
    checks = _model_checks(trainer, facts, pool, found)
    checks.before_training(report)
    report.stop_on_errors()
    report.warn()
    readers = {text.prompts: text.tokenizer for text in found.texts.values()}
    return Setup(
        pool, estimator, off_policy_estimator, same_vocabulary, checks, readers, dict(checks.encoders), found.blind
    )


def encoders_of(facts: RunFacts, found: Examined) -> dict[str, Callable[..., list[EncodedPrompt]]]:
    """How teachers with another tokenizer or processor read prompts, by the columns of these."""
    of_texts: dict[str, Callable[..., list[EncodedPrompt]]] = {
        text.prompts: functools.partial(_encoded_text, text.tokenizer, facts.template_kwargs)
        for text in found.texts.values()
    }
    how = {"template_kwargs": facts.template_kwargs, "chat_template": facts.chat_template}
    of_images: dict[str, Callable[..., list[EncodedPrompt]]] = {
        other.prompts: functools.partial(encode, other.processor, **how) for other in found.processors.values()
    }
    return of_texts | of_images


def _encoded_text(
    tokenizer: Any, template_kwargs: dict[str, Any], prompts: list[Any], tools: list[Any]
) -> list[EncodedPrompt]:
    return [EncodedPrompt(ids) for ids in prompts_ids(tokenizer, template_kwargs, tools, prompts)]


def _model_checks(trainer: Any, facts: RunFacts, pool: TeacherPool, found: Examined) -> ModelChecks:
    args = trainer.args
    return ModelChecks(
        facts=replace(facts, stops=trainer.eos_token_ids),  # with those of the teachers
        student=trainer.model,
        pool=pool,
        accelerator=trainer.accelerator,
        spec=DivergenceSpec(temperature=args.kl_temperature or args.temperature, stops=tuple(found.merged)),
        suppressed=[] if trainer.use_vllm else trainer.generation_config.suppress_tokens or [],
        readers={text.prompts: text.tokenizer for text in found.texts.values()},
        encoders=encoders_of(facts, found),
    )


def facts_of(trainer: Any) -> RunFacts:
    """What the preflight needs to know about the run."""
    evaluation = trainer.eval_dataset
    return RunFacts(
        args=trainer.args,
        student=unwrap_adapter(trainer.model),
        adapter=is_peft_model(trainer.model),
        tokenizer=trainer.tokenizer,
        stops=trainer.eos_token_ids,
        dataset=trainer.train_dataset,
        eval_datasets=evaluation if isinstance(evaluation, dict) else {"": evaluation},
        encode=trainer.encoded,
        processor=trainer.processor,
        chat_template=trainer.chat_template or getattr(trainer.processing_class, "chat_template", None),
        has_rewards=trainer.has_rewards,
        has_environments=trainer.has_environments,
        generate_every=trainer.args.micro_steps_per_generation,
        template_kwargs=dict(trainer.chat_template_kwargs),
        quiet=bool(trainer.args.disable_tqdm) or not trainer.accelerator.is_main_process,
    )


def add_reporting(trainer: Any, specs: dict[str, TeacherSpec]) -> None:
    """Add the summary table, and a plot for trackers; note the names of student, teachers and rewards."""
    trainer.facts = {
        "student": name_of(trainer.model),
        "teachers": {name: spec.name for name, spec in specs.items()},
        "reward_funcs": trainer.reward_func_names if trainer.has_rewards else [],
    }
    if not trainer.args.disable_tqdm:
        trainer.add_callback(SummaryTable())
    add_trackers(trainer, trainer.facts)


def _estimators(trainer: Any, found: Examined, teachers: int) -> tuple[Estimator, Estimator]:
    """The estimators for rollouts of the student and for the dataset's completions, from so many teachers."""
    args: OPDConfig = trainer.args
    make = functools.partial(
        make_estimator,
        temperature=args.kl_temperature or args.temperature,
        k=args.kl_top_k,
        stops=found.merged,
        also=measured_for(args),
        kernel=args.divergence_kernel,
    )
    estimator = make(
        args.kl_estimator,
        args.divergence,
        alpha=args.alpha_of(args.divergence),
        log_p_temperature=args.temperature if trainer.has_rewards else None,
    )
    if found.texts:  # there are no off-policy batches
        estimator = _of_texts(trainer, estimator, len(found.texts) < teachers)
    off_policy = args.off_policy_divergence
    return estimator, make("full", off_policy, alpha=args.alpha_of(off_policy))


def _of_texts(trainer: Any, of_ids: Estimator, mixed: bool) -> Estimator:
    """The estimator for teachers with another tokenizer; if `mixed`, there are others beside them."""
    args: OPDConfig = trainer.args
    stops = sorted(trainer.eos_token_ids)
    texts: CrossTokenizer | ClosedIds = CrossTokenizer(args.temperature, stops)
    if args.divergence != "reverse_kl":
        texts = ClosedIds(args.divergence, args.alpha_of(args.divergence), args.temperature, stops)
    return ByTokenizer(of_ids, texts) if mixed else texts


def _load(trainer: Any, specs: dict[str, TeacherSpec], estimator: Estimator, found: Examined) -> TeacherPool:
    """Load the teachers, and check that they give what the estimator needs."""
    args: OPDConfig = trainer.args
    trainer.saves_padding = True
    trainer.trims_prompts = has_relative_positions(unwrap_adapter(trainer.model).config)
    size = unwrap_adapter(trainer.model).config.get_text_config().vocab_size
    readers = {
        spec.identity: functools.partial(_reading_text, trainer, found.texts[spec.identity], size, spec)
        for spec in specs.values()
        if spec.identity in found.texts
    }
    pool = load_pool(specs, args, trainer.accelerator, trainer.model, size, readers)
    check_signals(args.kl_estimator, estimator, pool.teachers, args.kl_temperature or args.temperature)
    for name, spec in specs.items():
        if spec.identity in found.processors:
            pool.teachers[name].prompts = found.processors[spec.identity].prompts
    first, _ = pool.members[0]
    if isinstance(first.module, nn.Module):
        trainer.ref_model = first.module  # TRL's name for the model that the KL is measured against
    return pool


def _reading_text(trainer: Any, text: OtherTokenizer, size: int, spec: TeacherSpec, teacher: Teacher) -> Teacher:
    """A teacher that reads the student's completions as text; `size` is that of the student's vocabulary."""
    config = spec.config()
    theirs = len(text.pair.teacher) if config is None else config.get_text_config().vocab_size
    shared = shared_ids(text.pair, sorted(trainer.eos_token_ids), text.stops, size, theirs)
    return reader_of(teacher, text.pair, shared, trainer.args.temperature, text.prompts)


def _stop_at(trainer: Any, ids: list[int]) -> None:
    """Let any of these ids end a completion, in rollouts and in the saved student: all of them count as one stop."""
    trainer.end_rollouts_with(ids)
    unwrap_adapter(trainer.model).generation_config.eos_token_id = ids
    if is_peft_model(trainer.model):
        logger.warning(
            "A saved adapter does not store stop tokens. When you load it, generate with "
            f"`generate(..., eos_token_id={ids})`, or merge it into its base model first."
        )


def _stay_inside_vocabulary(trainer: Any, teacher_size: int | None) -> bool:
    """
    Keep rollouts to ids that the teacher has, where its vocabulary has fewer padding rows than the student's.

    Returns:
        `bool`: whether the divergence covers all of the student's ids.
    """
    student_size = unwrap_adapter(trainer.model).config.get_text_config().vocab_size
    if teacher_size is None or teacher_size >= student_size:
        return True
    args: OPDConfig = trainer.args
    found = f"The teacher's vocabulary ({teacher_size}) is smaller than the student's ({student_size})"
    remedy = (
        "Pad the teacher instead: `teacher.resize_token_embeddings(...)` to the student's "
        f"{student_size} rows, save it, and use that."
    )
    if args.kl_estimator != "full" or args.kl_discount > 0 or args.cross_tokenizer:
        raise ValueError(
            f"{found}, and only kl_estimator='full' with kl_discount=0 and without `cross_tokenizer` can renormalise "
            f"over the shared ids. {remedy}"
        )
    if trainer.use_vllm:
        raise ValueError(f"{found}, and vLLM rollouts cannot be kept inside it yet. {remedy}")
    if trainer.zero3:
        raise ValueError(f"{found}, which is not supported under ZeRO-3 yet. {remedy}")
    suppressed = [*(trainer.generation_config.suppress_tokens or []), *range(teacher_size, student_size)]
    trainer.generation_config.suppress_tokens = suppressed
    trainer.generation_kwargs["suppress_tokens"] = suppressed
    logger.warning(
        f"The teacher's vocabulary ends at {teacher_size}, the student's at {student_size}: the student's last "
        f"{student_size - teacher_size} ids are left out of the divergence and suppressed in rollouts."
    )
    return False
