"""Checks that run the models: LM heads against the models' own logits, and how far the student is from each teacher.

With whole weights they are made before training, on a few completions of the student. Where an engine shards weights,
all processes take part in each forward pass, and the engine is there only when training begins: then they are made on
the first rollouts.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..config import OPDConfig
from ..data.sampling import Sampling, prompts_ids, sample_ids
from ..heads.fused import DivergenceSpec, fused_divergence
from ..models.hidden_states import judged_states
from ..models.properties import special_ids, unwrap_adapter
from ..rollouts import MicroBatch, Rollouts
from ..signals import AlignedLogProbs, HiddenStates
from ..teachers.base import Teacher, is_sharded
from ..teachers.pool import TeacherPool, checked
from . import cross_tokenizer as cross_checks
from . import models as model_checks
from .findings import Finding, Report
from .models import Distance
from .preflight import RunFacts, readable_prompts
from .probes import PROBE_PROMPTS, Probe, first_tokens, own_completions


PROBE_TEXT = 64  # tokens of each completion of a teacher with another tokenizer
LEAST_TOKENS = 8  # tokens of all processes, below which rollouts show nothing


@dataclass(frozen=True)
class ModelChecks:
    """
    The checks of loaded models.

    Attributes:
        facts ([`~trl_distill.checks.preflight.RunFacts`]): the run; `stops` include those of the teachers.
        student (`torch.nn.Module`): the model that is trained; its forward pass is extended.
        pool ([`~trl_distill.teachers.pool.TeacherPool`]): teachers that are ready to score.
        accelerator ([`~accelerate.Accelerator`]): the trainer's.
        spec ([`~trl_distill.heads.fused.DivergenceSpec`]): the reverse KL, with temperature and stop tokens.
        suppressed (`Sequence[int]`): ids that are never sampled.
        readers (`dict`): tokenizers of teachers that have another one, by the columns of their prompts.
        encoders (`dict` of `Callable`): what turns prompts into what these teachers, and those with another processor,
            read.
    """

    facts: RunFacts
    student: nn.Module
    pool: TeacherPool
    accelerator: Accelerator
    spec: DivergenceSpec
    suppressed: Sequence[int] = ()
    readers: Mapping[str, Any] = field(default_factory=dict)
    encoders: Mapping[str, Any] = field(default_factory=dict)

    @property
    def wait_for_rollouts(self) -> bool:
        """Whether weights are sharded, so that `on_rollouts` makes the checks that `before_training` leaves out."""
        return is_sharded(self.accelerator)

    def before_training(self, report: Report) -> None:
        """
        Check what can be checked now.

        Args:
            report ([`~trl_distill.checks.findings.Report`]): collects the findings.

        Raises:
            ValueError: a head does not give its model's logits.
        """
        if self.wait_for_rollouts:
            report.add(Finding("models", "skipped", "Weights are sharded: heads and distance are checked in step 1."))
            return
        probe = None
        if any(teacher.gives in (HiddenStates, AlignedLogProbs) for teacher, _ in self.pool.members):
            names = {teacher.prompts for teacher, _ in self.pool.members} - set(self.readers)
            encoders = {name: encode for name, encode in self.encoders.items() if name in names}
            probe = own_completions(self.facts, self.student, self.accelerator, self.suppressed, encoders)
            check_head(self.student, "student", self.accelerator, probe.rollouts)
        self._check_teachers(probe, report)

    def on_rollouts(self, batch: MicroBatch, own: bool = True) -> Report | None:
        """
        The other checks, on every process.

        Args:
            batch ([`~trl_distill.rollouts.MicroBatch`]): of this process; the first tokens of a few rows are used.
            own (`bool`): whether the student wrote them.

        Returns:
            [`~trl_distill.checks.findings.Report`], *optional*: what was found, without errors. `None` if too few
            tokens are judged, such as where completions that were cut off are masked: try again with other rollouts.

        Raises:
            PreflightError: a teacher is the student itself.
            ValueError: a head does not give its model's logits.
        """
        report = Report()
        probe = Probe(
            first_tokens(batch.rollouts),
            {n: first_tokens(batch.read_by(n)) for n in self.encoders.keys() - self.readers},
        )
        if self.accelerator.reduce(probe.rollouts.mask.sum(), reduction="sum") < LEAST_TOKENS:
            return None
        check_head(self.student, "student", self.accelerator, probe.rollouts)
        self._check_teachers(probe, report, "of the student's own" if own else "of the dataset")
        report.stop_on_errors()
        report.warn()
        return report

    def _check_teachers(self, probe: Probe | None, report: Report, whose: str = "of the student's own") -> None:
        rollouts = probe and probe.rollouts
        for teacher, columns in self.pool.members:
            read = probe and probe.read_by(teacher)
            with teacher.on_device() as model:
                if model is not None:
                    check_head(model, "teacher", self.accelerator, None if teacher.reads_text else read)
            names = [self.pool.names[i] for i in columns]
            if teacher.prompts in self.readers:
                report.add(self._spans(teacher, names[0] if self.pool.several else "", rollouts))
            report.add(teacher_differs(self, teacher, names, probe, whose))

    def _spans(self, teacher: Any, name: str, rollouts: Rollouts | None) -> Finding:
        """
        How completions are spelled for a teacher with another tokenizer: its own first ones, or the student's where it
        is served or its weights are sharded.
        """
        if rollouts is not None and (teacher.gives is AlignedLogProbs or self.wait_for_rollouts):
            stops, pieces = teacher.shared.student_stops, []
            for ids in _judged(rollouts):
                stopped = bool(ids) and ids[-1] in stops
                pieces.append((ids[: len(ids) - stopped], stopped))
            return cross_checks.spans(teacher.pair, pieces, "the student's own first completions", name)
        facts, tokenizer = self.facts, self.readers[teacher.prompts]
        rows = readable_prompts(facts.dataset)[:PROBE_PROMPTS]
        if facts.has_environments or not rows:
            return Finding("spans", "skipped", "Prompts are not known before training, so the teacher wrote nothing.")
        prompts = prompts_ids(tokenizer, facts.template_kwargs, [t for _, t in rows], [prompt for prompt, _ in rows])
        limit = min(PROBE_TEXT, facts.args.max_completion_length or PROBE_TEXT)
        how = Sampling(limit, teacher.shared.teacher_stops, facts.args.temperature, seed=facts.args.seed)
        with teacher.on_device() as model, self.accelerator.autocast():
            plain = self.accelerator.unwrap_model(model)
            written = [one for (one,) in sample_ids(plain, prompts, teacher.shared.teacher_stops[0], how)]
        texts = [(cross_checks.respelled(teacher.pair, ids[: len(ids) - (not cut)]), not cut) for ids, cut in written]
        return cross_checks.spans(teacher.pair, texts, "the teacher's first completions", name)


def _judged(rollouts: Rollouts) -> list[list[int]]:
    """The judged tokens of each row."""
    ids = rollouts.input_ids[:, -rollouts.mask.shape[1] :]
    return [row[mask].tolist() for row, mask in zip(ids, rollouts.mask, strict=True)]


def check_head(model: nn.Module, whose: str, accelerator: Accelerator, rollouts: Rollouts | None = None) -> None:
    """
    Compare logits computed from hidden states with the model's own, at six tokens, and check that those are causal.
    Where rollouts have images, also at their judged tokens.

    Args:
        model (`torch.nn.Module`): its forward pass gives hidden states (see [`~trl_distill.signals.HiddenStates`]). If
            its weights are sharded, every process calls this at the same time.
        whose (`str`): "student" or "teacher", for the message.
        accelerator ([`~accelerate.Accelerator`]): the trainer's.
        rollouts ([`~trl_distill.Rollouts`], *optional*): as the model reads them.

    Raises:
        ValueError: they differ, or depend on later tokens.
    """
    base, training = unwrap_adapter(accelerator.unwrap_model(model)), model.training  # unwraps DeepSpeed's engine
    device = accelerator.device if is_sharded(accelerator) else next(base.parameters()).device
    a, b, c, d = _plain_ids(base.config)
    input_ids = torch.tensor([[a, b, c, d], [a, b, d, d]], device=device)  # two ends, for `check_causal`
    attended = torch.ones_like(input_ids)
    probe = Rollouts(input_ids, attended, attended[:, 1:].bool())
    with torch.no_grad(), accelerator.autocast():
        model.eval()
        states = model(input_ids=input_ids, attention_mask=attended, rollouts=probe)
        # in this order: ZeRO-3 prefetches what the forward pass before has used, here not the head, which we gather
        expected = model(input_ids=input_ids, attention_mask=attended, use_cache=False).logits[:, :-1]
        model.train(training)
        model_checks.check_causal(expected[:, :2], whose)
        with states.head.gathered() as head:
            model_checks.check_width(states.hidden.shape[-1], head.parameters()[0].shape[-1], whose)
            model_checks.check_logits(expected.flatten(0, 1), head.logits(states.hidden.to(expected.device)), whose)
    if rollouts is not None and rollouts.images is not None:
        _check_with_images(model, whose, accelerator, rollouts)


def _check_with_images(model: nn.Module, whose: str, accelerator: Accelerator, rollouts: Rollouts) -> None:
    """Compare logits at the judged tokens of the first of the rollouts that has an image."""
    assert rollouts.images is not None
    first = next((row for row, pixels in enumerate(rollouts.images.rows) if pixels), None)
    if first is None:
        return
    rollouts = rollouts.rows([first]).trimmed(prompts=False)
    training, mask = model.training, rollouts.mask
    takes = inspect.signature(unwrap_adapter(accelerator.unwrap_model(model)).forward).parameters
    few = {"logits_to_keep": mask.shape[1] + 1} if "logits_to_keep" in takes else {}  # of long prompts, 5 GB and more
    with torch.no_grad(), accelerator.autocast():
        model.eval()
        states = model(**rollouts.arguments, rollouts=rollouts)
        logits = model(**rollouts.arguments, use_cache=False, **few).logits
        model.train(training)
        expected = judged_states(logits, mask)  # logits are where hidden states would be
        with states.head.gathered() as head:
            model_checks.check_logits(expected, head.logits(states.hidden.to(expected.device)), whose)


def _plain_ids(config: Any) -> list[int]:
    """The first four ids that stand for no image."""
    special = special_ids(config)
    return list(itertools.islice((token for token in itertools.count() if token not in special), 4))


def in_fp32(student: nn.Module, args: OPDConfig, accelerator: Accelerator) -> bool:
    """Whether the student's logits are computed in fp32."""
    head = unwrap_adapter(student).get_output_embeddings()
    exact = accelerator.mixed_precision == "no" and head.weight.dtype == torch.float32
    return exact or bool(args.cast_lm_head_to_fp32)


def teacher_differs(run: ModelChecks, teacher: Teacher, names: list[str], probe: Probe | None, whose: str) -> Finding:
    """
    Measure KL(student ‖ teacher) on rollouts. 0 usually means that the wrong model was loaded.

    Args:
        run ([`ModelChecks`]): the run.
        teacher ([`~trl_distill.Teacher`]): ready to score.
        names (`list[str]`): its names.
        probe ([`Probe`], *optional*): `None` if no teacher gives hidden states.
        whose (`str`): who wrote them, such as "of the student's own".
    """
    if teacher.gives is not HiddenStates or probe is None:
        return Finding("teacher differs", "skipped", "Not measured: this teacher gives no hidden states.")
    facts, several = run.facts, len(run.pool.members) > 1
    args, columns = facts.args, getattr(facts.dataset, "column_names", None) or []
    how = (run.accelerator, probe.rollouts, run.spec, probe.read_by(teacher))
    distance = measure_distance(run.student, teacher, *how)._replace(whose=whose)
    unknown = facts.has_environments or not columns
    explained = {
        "it has its own prompts": "teacher_prompt" in columns,
        "prompts are unknown before training": unknown,
        "there is a reward": facts.has_rewards,
        "there are other teachers": several,
        "it follows the student": teacher.starts_equal,
    }
    reason = next((reason for reason, holds in explained.items() if holds), "")
    rough = not in_fp32(run.student, args, run.accelerator)
    name, own = ", ".join(names) if several else "", teacher.follows_student
    known = bool(readable_prompts(facts.dataset, 1)) and not unknown
    return model_checks.teacher_differs(distance, reason, args.assume_different_teacher, name, own, rough, known)


@torch.no_grad()
def measure_distance(
    student: nn.Module,
    teacher: Teacher,
    accelerator: Accelerator,
    rollouts: Rollouts,
    spec: DivergenceSpec,
    read: Rollouts | None = None,
) -> Distance:
    """
    KL(student ‖ teacher) on the judged tokens of any rollouts; `read` are these as the teacher reads them, if it has
    prompts of its own.

    With sharded weights it is called on every process, with as many rows, and takes the tokens of all.
    """
    signal: Any = checked(teacher, teacher.score(read or rollouts), int(rollouts.mask.sum()))
    training = student.training
    student.eval()
    with accelerator.autocast():
        states = student(**rollouts.arguments, rollouts=rollouts)
        found = fused_divergence(states.hidden, states.head, signal.hidden, signal.head, spec)
    student.train(training)
    sums = torch.stack([found.divergence.sum(), found.entropy.sum(), rollouts.mask.sum(), rollouts.mask.any(1).sum()])
    if is_sharded(accelerator):
        sums = accelerator.reduce(sums, reduction="sum")
    kl, entropy, tokens, completions = sums.tolist()
    uniform = math.log(unwrap_adapter(student).config.get_text_config().vocab_size) - entropy / max(tokens, 1)
    return Distance(kl / max(tokens, 1), uniform, int(tokens), int(completions))
