"""The token-level report of saved models: one HTML file that opens anywhere, offline.

    trl-distill report --model_name_or_path out/checkpoint-100 --teacher_model_name_or_path Qwen/Qwen3-4B \\
        --dataset_name prompts.jsonl

The student writes a completion of each prompt, and the page shows its tokens by their KL to the teacher, with what both
would rather have written. `--compare_with out/checkpoint-500` judges the same completions for a second student;
`--completions dataset` judges the dataset's own; `--reward_funcs module.function` adds rewards; `--report_to trackio`
(or `wandb`) logs the page too. During training: `trl_distill.TokenReport`. See docs/report.md.

Left out on purpose: several devices, and models that do not fit on one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from transformers.utils import logging as transformers_logging

from .. import foreign_text
from ..data.rewards import import_reward
from ..data.sampling import (
    SampledCompletion,
    Sampling,
    dataset_completion,
    preserving_state,
    sample_completions,
    scorer_of,
)
from ..models.properties import unwrap_adapter
from ..reporting.tokens import Summary, TokenTable, page
from ..reporting.tokens.collect import labels_of, scored, with_rewards
from ..reporting.tokens.spans import Reading, labels_of_both, scored_texts
from ..reporting.tokens.table import Completion, summary
from ..reporting.trackers import TRACKERS, log_page_alone
from .arguments import TEMPERATURE, CommandParser, check_sampling, errors_without_traceback, finite, template_kwargs
from .images import check_second_processor, processor_of, readable_rows, reader_of
from .models import (
    check_fit,
    check_second_student,
    first_prompts,
    load,
    never_written,
    reading_of,
    stop_ids_of_all,
    tokenizer_of,
)


console = foreign_text.console()


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(command="report", text=__doc__)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="the student: a folder, also an adapter's, or a name on the hub")
    add("--teacher_model_name_or_path", required=True, help="the teacher, likewise")
    add(
        "--dataset_name",
        required=True,
        help='prompts: a .jsonl file, folder or name on the hub, with a "prompt" column',
    )
    add("--dataset_split", default="train", help="the prompts' split")
    add("--num_prompts", type=int, default=50, help="how many, from the first")
    add("--compare_with", help="a second student: it judges the first one's completions, and writes some of its own")
    add("--completions", choices=["sample", "dataset"], default="sample", help='or those of a "completion" column')
    add("--num_generations", type=int, default=1, help="completions per prompt")
    add("--max_completion_length", type=int, default=256, help="tokens")
    add("--temperature", type=finite, default=1.0, help=TEMPERATURE)
    add("--reward_funcs", nargs="*", default=[], help="import paths (`module.function`) or names from trl.rewards")
    add(
        "--cross_tokenizer",
        action="store_true",
        help="the teacher has another tokenizer: the KL is that between texts, see docs/objective.md",
    )
    add("--chat_template_kwargs", type=template_kwargs, help="as in training: '{\"enable_thinking\": false}'")
    add("--seed", type=int, default=0, help="of everything that is drawn")
    add("--batch_size", type=int, default=8, help="completions at a time")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto", help="of both models; the checkpoint's own by default")
    add("--output", type=Path, default=Path("token_report.html"))
    add("--report_to", choices=["none", *TRACKERS], default="none")
    options = parser.parse_args(words)
    if options.completions == "dataset" and options.temperature == 0:
        parser.error("--temperature is 0, but with --completions dataset it is that of the KL alone: more than 0")
    check_sampling(parser, options)
    if options.output.is_dir():
        parser.error(f"--output {options.output} is a folder; name a file, such as {options.output / 'report.html'}")
    return options


class Collector:
    """Writes and judges batch by batch, with a progress bar."""

    def __init__(self, options: argparse.Namespace, rows: list[dict[str, Any]], tokenizer: Any, rewards: list[Any]):
        self.options, self.rows, self.tokenizer, self.rewards = options, rows, tokenizer, rewards
        self.processor = processor_of(options.model_name_or_path)
        names = (options.model_name_or_path, options.teacher_model_name_or_path)
        self.reader = reader_of(*names, options.chat_template_kwargs)

    def _batches(self, writer: Any, how: Sampling, teacher: Any, label: str, progress: Progress) -> Any:
        """Written completions, `batch_size` at a time."""
        size = max(1, self.options.batch_size // how.generations)
        bar = progress.add_task(label, total=len(self.rows))
        for start in range(0, len(self.rows), size):
            rows = self.rows[start : start + size]
            if self.options.completions == "dataset":
                yield [self._given(row, how) for row in rows]
            else:
                prompts = [self.reader.prompt(row) for row in rows]
                yield sample_completions(
                    writer, rows, prompts, self.tokenizer.pad_token_id, replace(how, seed=how.seed + start)
                )
            progress.update(bar, advance=len(rows))

    def _given(self, row: dict[str, Any], how: Sampling) -> SampledCompletion:
        """The dataset's completion of a row."""
        return dataset_completion(row, self.tokenizer, how, self.options.chat_template_kwargs, self.processor)

    def check_fit(self, students: Sequence[Any], teacher: Any, how: Sampling) -> None:
        """Raise `ValueError` if a prompt with its completion does not fit into one of the models."""
        lengths = []
        for row in self.rows:
            if self.options.completions == "dataset":
                found = self._given(row, how)
                lengths.append((found.read, len(found.completion)))
            else:
                lengths.append((self.reader.prompt(row), how.limit))
        whose = dict(zip(("student", "second student"), students, strict=False))
        configs = {name: unwrap_adapter(model).config for name, model in whose.items()}
        check_fit(self.rows, lengths, self.reader, configs, unwrap_adapter(teacher).config)

    def collect(
        self,
        writer: Any,
        judges: list[Any],
        teacher: Any,
        how: Sampling,
        merged: list[int],
        label: str,
        reading: Reading | None = None,
    ) -> list[Completion]:
        """`writer` writes, `judges` are compared with the teacher on that, by `reading` as texts; with rewards."""
        written: list[SampledCompletion] = []
        completions: list[Completion] = []
        with Progress(console=console) as progress, preserving_state(writer, teacher, *judges):
            for batch in self._batches(writer, how, teacher, label, progress):
                scorers = [scorer_of(judge) for judge in judges]
                device, temperature = self.options.device, how.kl_temperature
                if reading is not None:
                    completions += scored_texts(batch, scorers, reading, self.tokenizer, device, temperature)
                else:
                    asked = (scorer_of(teacher), self.tokenizer, device, merged, temperature, self.reader)
                    completions += scored(batch, scorers, *asked)
                written += batch
        return with_rewards(completions, written, self.rewards, self.tokenizer)


def main(words: list[str] | None = None) -> None:
    options = arguments(words)
    transformers_logging.disable_progress_bar()
    with errors_without_traceback():
        rewards = [import_reward(path) for path in options.reward_funcs]
        dataset = first_prompts(options.dataset_name, options.dataset_split, options.num_prompts)
        names = [options.model_name_or_path, *([options.compare_with] if options.compare_with else [])]
        rows = readable_rows(dataset, names, options.teacher_model_name_or_path, options.cross_tokenizer)
        if options.compare_with:
            check_second_processor(rows, *names)
    console.print("Loading models ...")
    students = [load(name, "student", options.dtype, options.device) for name in names]
    teacher_name = options.teacher_model_name_or_path
    teacher = load(teacher_name, "teacher", options.dtype, options.device)
    tokenizer = tokenizer_of(options.model_name_or_path)
    reading = reading_of(tokenizer, teacher_name, teacher, students[0], options)
    if options.compare_with:
        check_second_student(tokenizer, options.compare_with, students[1])

    alike = students if reading is not None else [*students, teacher]  # those whose ids are the student's
    stops, merged = stop_ids_of_all(alike, tokenizer)
    if reading is not None:
        reading = replace(reading, stops=stops)
    how = Sampling(
        options.max_completion_length,
        tuple(stops),
        options.temperature,
        options.num_generations,
        options.seed,
        suppressed=tuple(sorted({one for student in students for one in never_written(student, alike[-1])})),
    )
    collector = Collector(options, rows, tokenizer, rewards)
    own: list[Summary] = []
    with errors_without_traceback():
        collector.check_fit(students, teacher, how)
        completions = collector.collect(students[0], students, teacher, how, merged, "judging", reading)
        if options.compare_with and options.completions == "sample":
            others = collector.collect(
                students[1], students[1:], teacher, how, merged, "the second student's own", reading
            )
            own = [summary(completions), summary(others)]
    table = TokenTable(
        title=f"{' and '.join(Path(name).name for name in names)}: tokens by KL to {Path(teacher_name).name}",
        teacher=teacher_name,
        students=tuple(names),
        completions=tuple(completions),
        labels=labels_of(completions, tokenizer)
        if reading is None
        else labels_of_both(completions, tokenizer, reading.tokenizer),
        own=tuple(own),
        settings={
            "prompts": options.dataset_name,
            "completions": "of the dataset" if options.completions == "dataset" else "sampled",
            "temperature": f"{how.temperature:g}" + f", of the KL {how.kl_temperature:g}" * (how.temperature == 0),
            "seed": str(options.seed),
            "up to": f"{options.max_completion_length} tokens",
        },
    )
    write(table, options)


def write(table: TokenTable, options: argparse.Namespace) -> None:
    """The page to its file, perhaps to a tracker, and a last line that says where it lies."""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page(table), encoding="utf-8")
    if options.report_to != "none":
        facts = {"student": table.students[0], "teacher": table.teacher, **table.settings}
        log_page_alone(options.report_to, options.output, "reports/tokens", facts)
    of_all = summary(table.completions)
    console.print(
        f"{of_all.completions} completions, {of_all.tokens} tokens, {of_all.kl or 0:.3f} nats per token from the "
        f"teacher. The report is in {options.output}",
        highlight=False,
        soft_wrap=True,
    )


def run(words: list[str]) -> None:
    """The command."""
    main(words)
