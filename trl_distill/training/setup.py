"""Before the first step: student, teachers and estimator are checked against each other and brought together.

What is checked is in `checks.py` and `preflight.py`, what becomes of it once training runs in `trainer.py`.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import nn

from ..checks import findings
from ..checks import models as model_checks
from ..checks import settings as setting_checks
from ..checks import tokenizers as tokenizer_checks
from ..checks.findings import Report
from ..checks.preflight import LONGEST_OF, examine, probe_kl, prompts_to_look_at
from ..checks.teachers import check_signals
from ..config import OPDConfig
from ..data.completions import token_ids
from ..estimators import make_estimator
from ..estimators.base import Estimator
from ..heads.lm_head import LMHead
from ..models.hidden_states import last_hidden_state
from ..models.properties import context_of, has_relative_positions, name_of, real_stops, unwrap_adapter
from ..models.student import add_student_forward
from ..reporting.summary_table import SummaryTable
from ..reporting.tokens.callback import TokenReport
from ..reporting.wandb_run import WandbExtras
from ..signals import HiddenStates
from ..teachers.base import Teacher
from ..teachers.local import LocalTeacher
from ..teachers.pool import TeacherPool
from ..teachers.self_distillation import ADAPTER_OFF, AdapterOff, FollowStudent, MovingAverage
from ..teachers.server import ServedTeacher
from ..teachers.spec import load_pool, student_config, teacher_config
from .safeguards import Safeguards


logger = logging.getLogger(__name__)


class Assembly(Safeguards):
    """
    A trainer with teachers, an estimator and a student whose forward answers to both.

    Attributes:
        panel ([`~trl_distill.teachers.pool.TeacherPool`], *optional*): the teachers; `None` for plain GRPO.
        estimator ([`~trl_distill.estimators.base.Estimator`]): of the divergence.
        off_policy_estimator ([`~trl_distill.estimators.base.Estimator`]): of that on the dataset's completions.
        preflight ([`~trl_distill.checks.findings.Report`]): what was found before the first step.
        same_vocabulary (`bool`): whether the divergence is taken over all ids of the student.
    """

    panel: TeacherPool | None = None
    estimator: Estimator
    off_policy_estimator: Estimator
    preflight: Report
    same_vocabulary: bool = True

    @property
    def teacher(self) -> Teacher | None:
        """The teacher; of several, the first."""
        return self.panel.members[0][0] if self.panel is not None else None

    @staticmethod
    def check_before_loading(model: Any, specs: dict[str, Any], args: OPDConfig) -> None:
        """What can be known of student and teachers before anything is loaded."""
        for spec in specs.values():
            if isinstance(spec, str | nn.Module):
                model_checks.check_text_only(teacher_config(spec, args), "teacher")
            if (
                isinstance(spec, nn.Module)
                and not isinstance(model, str)
                and unwrap_adapter(spec) is unwrap_adapter(model)
            ):
                raise ValueError(
                    "`teacher_model` is the student itself, or the base model under its adapter: the same weights "
                    "would be trained and frozen. Load the teacher once more, as a model of its own, or ask for the "
                    f"student without its adapter by name: `teacher_model={ADAPTER_OFF!r}`."
                )
        config = student_config(model, args) if isinstance(model, str) else unwrap_adapter(model).config
        model_checks.check_text_only(config, "student")

    def track(self, specs: dict[str, Any]) -> None:
        """Tables and pictures of the run; where wandb is logged to, it says who was distilled from whom, with what."""
        if not self.args.disable_tqdm:
            self.add_callback(SummaryTable())
        if "wandb" in self.args.report_to:
            facts = {
                "student": name_of(self.model),
                "teachers": {name: name_of(spec) for name, spec in specs.items()},
                "reward_funcs": self.reward_func_names if self.has_rewards else [],
            }
            self.add_callback(WandbExtras(facts))

    def show_to_reports(self) -> None:
        """Let every [`~trl_distill.TokenReport`] look at this trainer, or refuse to."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TokenReport):
                callback.bind(self)

    def add_teachers(self, specs: dict[str, Any]) -> None:
        """Check that teachers and student fit, load the teachers, and let the student answer their signals."""
        args, report = self.args, Report()
        self.preflight = report
        student = unwrap_adapter(self.model)
        text_config = student.config.get_text_config()
        stops, merged = real_stops(set(self.eos_token_ids), self.tokenizer), set()
        prompts, hints = (self._first_prompts(column) for column in ("prompt", "teacher_prompt"))
        conversational = not any(isinstance(p, str) for p in prompts_to_look_at(self.train_dataset)[:1])
        if prompts:
            report.add(
                model_checks.context_length(
                    max(map(len, prompts)), args.max_completion_length or 0, context_of(text_config), "student"
                )
            )
        longest = max(map(len, prompts + hints), default=None)
        for spec in specs.values():
            size, theirs = examine(report, spec, args, self.tokenizer, student, longest, conversational)
            if theirs:
                report.add(tokenizer_checks.stop_tokens(self.tokenizer, stops, theirs, args.merge_stop_tokens))
            if theirs and theirs != stops:
                merged |= stops | theirs
            if size is not None and not report.count("error"):
                self._stay_inside_vocabulary(size, text_config.vocab_size)
        if args.lmbda < 1:
            self._look_at_completions(report)
        report.add(
            setting_checks.sampling(args.biased_sampling),
            setting_checks.groups(args.num_generations, args.prompts_per_generation, self.has_rewards),
        )
        if args.save_strategy == "steps":
            report.add(
                setting_checks.checkpoint_boundary(
                    args.save_steps, args.gradient_accumulation_steps, args.micro_steps_per_generation
                )
            )
        report.stop_on_errors()
        if merged and args.merge_stop_tokens:
            self._stop_at(sorted(merged.union(self.eos_token_ids)))
        if args.kl_estimator == "topk" and args.divergence == "forward_kl" and not self.in_fp32:
            raise ValueError(
                "kl_estimator='topk' with divergence='forward_kl' takes the difference of nearly equal masses, which "
                "16-bit logits lose. Set `cast_lm_head_to_fp32=True`, or use kl_estimator='full'."
            )
        self._check_head(student, "student")
        make = functools.partial(
            make_estimator,
            temperature=args.kl_temperature or args.temperature,
            k=args.kl_top_k,
            stops=sorted(merged) if args.merge_stop_tokens else [],
        )
        self.estimator = make(
            args.kl_estimator,
            args.divergence,
            alpha=args.alpha_of(args.divergence),
            log_p_temperature=args.temperature if self.has_rewards else None,
        )
        off_policy = args.off_policy_divergence
        self.off_policy_estimator = make("full", off_policy, alpha=args.alpha_of(off_policy))
        self.saves_padding = True
        self.trims_prompts = has_relative_positions(student.config)
        self.panel = load_pool(specs, args, self.accelerator, self.model, text_config.vocab_size)
        check_signals(args.kl_estimator, self.estimator, self.panel.teachers, args.kl_temperature or args.temperature)
        if isinstance(self.teacher, LocalTeacher):
            self.ref_model = self.teacher.model  # where TRL keeps the model that the KL is taken to
        add_student_forward(student, fp32_head=args.cast_lm_head_to_fp32)
        for teacher, columns in self.panel.members:
            if isinstance(teacher, LocalTeacher):
                with teacher.on_device() as model:
                    self._check_head(model, "teacher")
            if isinstance(teacher, MovingAverage):
                if self.panel.several:
                    teacher.file_name = f"teacher_ema.{columns[0]}.safetensors"
                self.add_callback(FollowStudent(teacher))
            if isinstance(teacher, ServedTeacher):
                teacher.check()
            report.add(self._difference(teacher, columns))
        report.stop_on_errors()
        report.warn()

    def _first_prompts(self, column: str, limit: int = LONGEST_OF) -> list[list[int]]:
        """Token ids of the first prompts in a column; empty where they cannot be known before they are used."""
        prompts = [] if self.has_environments else prompts_to_look_at(self.train_dataset, column)[:limit]
        return self.token_ids_of(prompts) if prompts else []

    def _look_at_completions(self, report: Report) -> None:
        """Whether the dataset's completions fit, as far as they are known before they are used."""
        rows, limit, kwargs = self.train_dataset, self.max_completion_length, self.chat_template_kwargs
        if not isinstance(rows, Dataset) or limit is None:
            return
        rows = rows.select(range(min(LONGEST_OF, len(rows))))
        found = [token_ids(row, self.tokenizer, self.eos_token_ids, limit + 1, dict(kwargs)) for row in rows]  # type: ignore[arg-type]
        cut = sum(len(completion) > limit for _, completion in found)
        report.add(setting_checks.completions(cut, len(found), limit))

    def _difference(self, teacher: Teacher, places: list[int]) -> findings.Finding:
        """Measure KL(student ‖ teacher) on a few prompts: 0 means that the wrong model was loaded."""
        assert self.panel is not None
        name = ", ".join(self.panel.names[i] for i in places) if self.panel.several else ""
        if self.is_sharded or getattr(teacher, "gives", None) is not HiddenStates:
            why = "weights are sharded" if self.is_sharded else "this teacher gives no hidden states"
            return findings.Finding("teacher differs", "skipped", f"Not measured: {why}.")
        rows = self._first_prompts("prompt", limit=4) or [list(range(min(32, len(self.tokenizer))))]
        kl = max(probe_kl(self.model, teacher, self.accelerator, ids) for ids in rows)
        columns = getattr(self.train_dataset, "column_names", None) or []
        explained = {
            "it has prompts of its own": "teacher_prompt" in columns,
            "rows are not known before they are used": self.has_environments or not columns,
            "there is a reward": self.has_rewards,
            "there are other teachers": len(self.panel.members) > 1,
            "it follows the student": isinstance(teacher, MovingAverage),
        }
        reason = next((reason for reason, holds in explained.items() if holds), "")
        own = isinstance(teacher, AdapterOff | MovingAverage)
        return model_checks.teacher_differs(kl, reason, self.args.assume_different_teacher, name, own, not self.in_fp32)

    @property
    def in_fp32(self) -> bool:
        """Whether the student's logits are computed in fp32."""
        head = unwrap_adapter(self.model).get_output_embeddings()
        exact = self.accelerator.mixed_precision == "no" and head.weight.dtype == torch.float32
        return exact or self.args.cast_lm_head_to_fp32

    @property
    def is_sharded(self) -> bool:
        """Whether models are cut up among processes, so that they cannot be called alone."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _check_head(self, model: nn.Module, whose: str) -> None:
        """Compare our way from hidden states to logits with the model's own on four tokens; not on sharded weights."""
        if self.is_sharded:
            return
        base, training = unwrap_adapter(model), model.training
        token_ids = torch.arange(4, device=next(base.parameters()).device)[None]
        with torch.no_grad(), self.accelerator.autocast():
            model.eval()
            with last_hidden_state(base.base_model) as caught:
                expected = model(input_ids=token_ids, use_cache=False).logits
            # some, such as OPT, go past what others give their hidden states with
            hidden = caught[0] if caught else base.base_model(input_ids=token_ids, use_cache=False).last_hidden_state
            model.train(training)
            model_checks.check_logits(expected, LMHead(base).logits(hidden.to(expected.device)), whose)

    def _stop_at(self, ids: list[int]) -> None:
        """Let rollouts, and the student that is saved, end with any of these ids: all mean the end to the teacher."""
        self.end_rollouts_with(ids)
        unwrap_adapter(self.model).generation_config.eos_token_id = ids
        if is_peft_model(self.model):
            logger.warning(
                "An adapter's folder holds no stop tokens. Whoever loads it generates with "
                f"`generate(..., eos_token_id={ids})`, or merges it into its base first."
            )

    def _stay_inside_vocabulary(self, teacher_size: int, student_size: int) -> None:
        """Keep rollouts to ids that the teacher has an opinion on, where its vocabulary is padded less."""
        if teacher_size >= student_size:
            return
        self.same_vocabulary = False
        remedy = (
            "Pad the teacher instead: `teacher.resize_token_embeddings(...)` to the student's "
            f"{student_size} rows, save it, and use that."
        )
        if self.args.kl_estimator != "full" or self.args.kl_discount > 0:
            raise ValueError(
                f"The teacher's vocabulary ({teacher_size}) is smaller than the student's ({student_size}), which only "
                f"kl_estimator='full' with kl_discount=0 renormalises. {remedy}"
            )
        if self.use_vllm:
            raise ValueError(
                f"The teacher's vocabulary ({teacher_size}) is smaller than the student's ({student_size}), and vLLM "
                f"rollouts cannot be kept inside it yet. {remedy}"
            )
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                f"The teacher's vocabulary ({teacher_size}) is smaller than the student's ({student_size}), which is "
                f"not supported under ZeRO-3 yet. {remedy}"
            )
        suppressed = [*(self.generation_config.suppress_tokens or []), *range(teacher_size, student_size)]
        self.generation_config.suppress_tokens = suppressed
        self.generation_kwargs["suppress_tokens"] = suppressed
        logger.warning(
            f"The teacher's vocabulary ends at {teacher_size}, the student's at {student_size}: the student's last "
            f"{student_size - teacher_size} ids are left out of the divergence and suppressed in rollouts."
        )
