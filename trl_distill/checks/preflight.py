"""The preflight: all checks of a run, in order. The single checks are functions in the other modules of this folder.

Here: all that is known before teachers are loaded, that is, configurations, tokenizers, stop ids, lengths. What takes
loaded models is in `loaded.py`. `trl-distill check` runs the preflight alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..alignment.vocabularies import Vocabularies
from ..config import OPDConfig
from ..data.completions import token_ids
from ..data.images import prompt_of, shows_images, tidy_row
from ..images import EncodedPrompt
from ..models.properties import context_of, real_stops, stop_ids, unwrap_adapter
from ..teachers.self_distillation import ADAPTER_OFF
from ..teachers.spec import TeacherSpec, student_config
from . import cross_tokenizer as cross_checks
from . import images as image_checks
from . import models as model_checks
from . import prompts as prompt_checks
from . import settings as setting_checks
from . import tokenizers as tokenizer_checks
from .findings import Finding, Report
from .prompts import Prompts, count


FIRST_ROWS = 512  # of the dataset's completions that are tokenised


def check_before_loading(model: Any, specs: dict[str, TeacherSpec], args: OPDConfig, adapter: bool = False) -> None:
    """
    Check what is known about student and teachers before anything is loaded.

    Args:
        model: the student, or its name.
        specs (`dict[str, TeacherSpec]`): the teachers.
        args ([`OPDConfig`]): resolved.
        adapter (`bool`): whether an adapter will be added to the student.

    Raises:
        ValueError: a model is not a text model, a teacher is the student itself, or the student cannot be saved.
    """
    if not adapter and (isinstance(model, str) or not is_peft_model(model)):
        gguf = isinstance(model, str) and "gguf_file" in (args.model_init_kwargs or {})
        finding = model_checks.cannot_be_saved("GGUF") if gguf else model_checks.saveable(model, adapter)
        if finding.level == "error":
            raise ValueError(str(finding))
    for spec in specs.values():
        config = spec.config()
        if config is not None:
            model_checks.check_architecture(config, "teacher")
        same = spec.model is not None and not isinstance(model, str)
        if same and unwrap_adapter(spec.model) is unwrap_adapter(model):
            raise ValueError(
                "`teacher_model` is the student itself, or the base model under its adapter: the same weights "
                "would be trained and frozen. Load the teacher again as a separate model, or use the "
                f"student without its adapter by name: `teacher_model={ADAPTER_OFF!r}`."
            )
    config = student_config(model, args) if isinstance(model, str) else unwrap_adapter(model).config
    model_checks.check_architecture(config, "student")


@dataclass(frozen=True)
class RunFacts:
    """
    What the preflight needs to know about the run, besides the teachers.

    Attributes:
        args ([`OPDConfig`]): resolved.
        student ([`~transformers.PreTrainedModel`]): without its adapter.
        adapter (`bool`): whether it has one.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the student's.
        stops (`list[int]`): ids that end a completion.
        dataset (`Any`): training dataset.
        eval_datasets (`dict[str, Any]`): evaluation datasets by name.
        encode (`Callable`): turns prompts, with their rows' tools, into [`~trl_distill.images.EncodedPrompt`], as in
            training.
        has_rewards (`bool`): whether there are rewards.
        has_environments (`bool`): whether environments write prompts, which are then unknown beforehand.
        generate_every (`int`): micro-steps per generation batch.
        template_kwargs (`dict`): keyword arguments of the chat template.
        processor (`ProcessorMixin`, *optional*): of a vision-language student.
        chat_template (`str`, *optional*): the student's.
        quiet (`bool`): whether to show no progress bars.
    """

    args: OPDConfig
    student: PreTrainedModel
    adapter: bool
    tokenizer: PreTrainedTokenizerBase
    stops: list[int]
    dataset: Any
    eval_datasets: dict[str, Any]
    encode: Callable[[list[Any], list[Any]], list[EncodedPrompt]]
    has_rewards: bool
    has_environments: bool
    generate_every: int
    template_kwargs: dict[str, Any]
    processor: Any = None
    chat_template: Any = None
    quiet: bool = True

    def first_prompts(self, limit: int) -> list[tuple[Any, Any]]:
        """The first prompts with their rows' tools; empty if they are unknown before training."""
        return [] if self.has_environments else readable_prompts(self.dataset, limit)

    def counted_prompts(self) -> list[Prompts]:
        """All prompts that can be read before training, tokenised and looked at, those of teachers included."""
        if self.has_environments:
            return []
        bos, stops = self.tokenizer.bos_token_id, real_stops({*self.stops, self.tokenizer.eos_token_id}, self.tokenizer)
        datasets = {"the training dataset": self.dataset} | {
            f"the evaluation dataset {name!r}" if name else "the evaluation dataset": dataset
            for name, dataset in self.eval_datasets.items()
        }
        found = [
            count(dataset, name, column, self.encode, bos, stops, self.quiet)
            for column in ("prompt", "teacher_prompt")
            for name, dataset in datasets.items()
        ]
        return [prompts for prompts in found if prompts is not None]

    @property
    def conversational(self) -> bool:
        """Whether prompts go through a chat template, as far as is known."""
        return not any(isinstance(prompt, str) for prompt, _ in readable_prompts(self.dataset, 1))


@dataclass(frozen=True)
class OtherTokenizer:
    """
    A teacher with another tokenizer than the student's.

    Attributes:
        pair ([`~trl_distill.alignment.vocabularies.Vocabularies`]): both tokenizers, compared.
        tokenizer (`PreTrainedTokenizerBase`): the teacher's.
        stops (`list[int]`): its ids that end a turn.
        prompts (`str`): the columns of a batch that hold its prompts; teachers with the same tokenizer share them.
    """

    pair: Vocabularies
    tokenizer: Any
    stops: list[int]
    prompts: str


@dataclass(frozen=True)
class OtherProcessor:
    """
    A teacher that reads images in another way than the student.

    Attributes:
        processor (`ProcessorMixin`): the teacher's.
        prompts (`str`): the columns of a batch that hold its prompts.
    """

    processor: Any
    prompts: str


@dataclass
class Examined:
    """
    Results of the preflight before loading.

    Attributes:
        report ([`~trl_distill.checks.findings.Report`]): all findings.
        vocab_size (`int`, *optional*): smallest vocabulary size of the teachers; `None` if unknown.
        merged (`list[int]`): stop tokens that count as one, if student and teachers have different ones.
        texts (`dict` of [`OtherTokenizer`]): with `cross_tokenizer`, teachers that have another tokenizer, by identity.
        processors (`dict` of [`OtherProcessor`]): teachers that read images in another way than the student.
        blind (`dict` of [`~trl_distill.checks.findings.Finding`]): what to say of teachers that see no images, by name,
            where it is not known whether there are any.
    """

    report: Report
    vocab_size: int | None = None
    merged: list[int] = field(default_factory=list)
    texts: dict[Any, OtherTokenizer] = field(default_factory=dict)
    processors: dict[Any, OtherProcessor] = field(default_factory=dict)
    blind: dict[str, Finding] = field(default_factory=dict)


def examine(facts: RunFacts, specs: dict[str, TeacherSpec], report: Report) -> Examined:
    """
    Compare student, teachers, dataset and settings before anything is loaded.

    Args:
        facts ([`RunFacts`]): the run.
        specs (`dict[str, TeacherSpec]`): the teachers.
        report ([`~trl_distill.checks.findings.Report`]): collects the findings.

    Raises:
        PreflightError: at least one finding is an error.
    """
    args, found, prompts = facts.args, Examined(report), facts.counted_prompts()
    own = [one for one in prompts if one.column == "prompt"]
    report.add(_context(facts, own, context_of(facts.student.config.get_text_config()), "student"))
    if prompts:
        report.add(prompt_checks.special_tokens(prompts, facts.tokenizer))
    stops, merged = real_stops(set(facts.stops), facts.tokenizer), set()
    shown = facts.processor is not None and any(map(shows_images, (facts.dataset, *facts.eval_datasets.values())))
    for spec in specs.values():
        teacher_stops = _examine_teacher(facts, spec, found, prompts)
        if facts.processor is not None:
            _examine_sight(facts, spec, found, shown)
        if teacher_stops:
            report.add(tokenizer_checks.stop_tokens(facts.tokenizer, stops, teacher_stops, args.merge_stop_tokens))
        if teacher_stops and teacher_stops != stops:
            merged |= stops | teacher_stops
    if args.cross_tokenizer and not found.texts and not report.count("error"):
        report.add(cross_checks.needless())
    readers = {name for name, spec in specs.items() if spec.identity in found.texts}
    if readers and len(specs) > 1:
        report.add(*cross_checks.weights(facts.dataset, args.teacher_weights, list(specs), readers))
    if args.lmbda < 1:
        _examine_completions(facts, report)
    report.add(
        model_checks.saveable(facts.student, facts.adapter),
        setting_checks.sampling(args.biased_sampling, setting_checks.left_aside(facts.student.generation_config)),
        setting_checks.groups(
            args.num_generations, args.prompts_per_generation, args.reward_baseline if facts.has_rewards else None
        ),
    )
    if args.save_strategy == "steps":
        report.add(
            setting_checks.checkpoint_boundary(args.save_steps, args.gradient_accumulation_steps, facts.generate_every)
        )
    report.stop_on_errors()
    if args.merge_stop_tokens:
        found.merged = sorted(merged)
    return found


def _context(facts: RunFacts, prompts: list[Prompts], context: int | None, whose: str) -> Finding:
    """Whether all prompts that were counted fit into a model's context, with a completion."""
    if not prompts:
        reason = "environments write the prompts" if facts.has_environments else "the dataset is a stream"
        return Finding(f"context, {whose}", "skipped", f"Lengths are not known before training: {reason}.")
    longest = max(prompts, key=lambda one: one.longest)
    counted, where = "; ".join(map(str, prompts)), f"row {longest.longest_row} of {longest.name}"
    completion = facts.args.max_completion_length or 0
    return model_checks.context_length(longest.longest, completion, context, whose, counted, where)


def _examine_teacher(facts: RunFacts, spec: TeacherSpec, found: Examined, prompts: list[Prompts]) -> set[int]:
    """Compare one teacher with the student; returns the ids that end a turn for it."""
    if not spec.can_be_examined:
        return set()
    args, report, config, tokenizer = facts.args, found.report, spec.config(), spec.tokenizer()
    if args.cross_tokenizer and cross_checks.has_another(facts.tokenizer, tokenizer):
        _examine_other_tokenizer(facts, spec, found, prompts)
        return set()
    report.add(
        tokenizer_checks.same_tokenizer(facts.tokenizer, tokenizer, args.assume_same_tokenizer, spec.served),
        tokenizer_checks.chat_templates(facts.tokenizer, tokenizer, facts.conversational, facts.template_kwargs),
    )
    if config is not None:
        text = config.get_text_config()
        student_size = facts.student.config.get_text_config().vocab_size
        report.add(
            tokenizer_checks.vocabulary(facts.tokenizer, student_size, text.vocab_size, args.assume_same_tokenizer)
        )
        report.add(_context(facts, prompts, context_of(text), "teacher"))
        found.vocab_size = min(text.vocab_size, found.vocab_size or text.vocab_size)
    return stop_ids(config, spec.generation_config(), tokenizer)


def _examine_sight(facts: RunFacts, spec: TeacherSpec, found: Examined, shown: bool) -> None:
    """Whether a teacher sees images as the student does; `shown` says whether a dataset is known to have some."""
    if not spec.can_be_examined:
        return
    config, processor = spec.config(), spec.processor()
    sight = image_checks.teacher_sees(config, spec.name, spec.served, spec.identity in found.texts)
    if sight.level == "error" and not shown:
        found.blind[spec.name] = sight
        return
    if shown:
        found.report.add(sight)
    if processor is None:
        if shown and config is not None:
            found.report.add(image_checks.no_processor(spec.name))
        return
    different = image_checks.differences(facts.processor, processor)
    if different and spec.identity not in found.processors:
        found.processors[spec.identity] = OtherProcessor(processor, f"image_prompt_{len(found.processors)}")
    if shown:
        found.report.add(image_checks.processors(different))


def _examine_other_tokenizer(facts: RunFacts, spec: TeacherSpec, found: Examined, prompts: list[Prompts]) -> None:
    """Compare a teacher that has another tokenizer with the student."""
    config, tokenizer = spec.config(), spec.tokenizer()
    stops = sorted(stop_ids(config, spec.generation_config(), tokenizer))
    pair, finding = cross_checks.compared(facts.tokenizer, tokenizer, stops, spec.served)
    found.report.add(finding)
    if pair is not None and spec.identity not in found.texts:
        alike = [text.prompts for text in found.texts.values() if text.pair.teacher.hash == pair.teacher.hash]
        name = alike[0] if alike else f"text_prompt_{len({text.prompts for text in found.texts.values()})}"
        found.texts[spec.identity] = OtherTokenizer(pair, tokenizer, stops, name)
    if tokenizer is not None and stops:
        own = sorted(real_stops(set(facts.stops), facts.tokenizer))
        found.report.add(cross_checks.stop_tokens(facts.tokenizer, tokenizer, own, stops))
    if tokenizer is not None and facts.conversational:
        found.report.add(cross_checks.thoughts(facts.tokenizer, tokenizer, facts.template_kwargs))
    if config is not None:  # lengths are in the student's tokens: about as many as the teacher's
        found.report.add(_context(facts, prompts, context_of(config.get_text_config()), "teacher"))


def _examine_completions(facts: RunFacts, report: Report) -> None:
    """Whether the dataset's first completions fit into the length limit, if they can be read beforehand."""
    rows, limit = facts.dataset, facts.args.max_completion_length
    if not isinstance(rows, Dataset) or limit is None:
        return
    first = rows.select(range(min(FIRST_ROWS, len(rows))))
    how = (facts.tokenizer, facts.stops, limit + 1, facts.template_kwargs, facts.processor)
    found = [token_ids(row if facts.processor is None else tidy_row(row), *how) for row in first]
    cut = sum(len(completion) > limit for _, completion in found)
    report.add(setting_checks.completions(cut, len(found), limit, len(rows)))


def readable_prompts(dataset: Any, limit: int = FIRST_ROWS) -> list[tuple[Any, Any]]:
    """
    The first prompts of a dataset, images included, with their rows' tools; none if they cannot be read without
    consuming it.
    """
    if not isinstance(dataset, Dataset) or "prompt" not in dataset.column_names:
        return []
    rows = (tidy_row(dataset[number]) for number in range(min(len(dataset), limit)))
    return [(prompt_of(row), row.get("tools")) for row in rows if row["prompt"]]
