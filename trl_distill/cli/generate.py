"""Have teachers complete prompts, verify and filter what they wrote, and save a dataset with a card.

    trl-distill generate --dataset_name prompts.jsonl --teacher_model_name_or_path Qwen/Qwen3-8B \\
        --num_generations 4 --reward_funcs my_module.correct --keep correct --output_dir data

`--dataset_name` is a name on the hub, a local folder or a `.jsonl` file, with a column "prompt" (text or messages), and
images in "image", "images" or messages. The result is read by `trl sft --dataset_name data` and by `trl-distill train`.
A run killed at any point is resumed by the same command; nothing is asked twice. All settings may stand in a YAML file
given as `--config`.

Teachers: a folder or hub name, `vllm:name`, `http://host:port/v1#model`; several as
`--teacher_models '{"a": "...", "b": "..."}'`. Verifiers: `--reward_funcs`, `--reward_model` or `--judge`. Preference
pairs: `--pairs`. More prompts of the same kind: `--new_prompts 1000`. See docs/synthetic_data.md.

Left out on purpose: training, and pushing to the hub (`hf upload` does that).
"""

from __future__ import annotations

import sys

from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from .. import foreign_text
from ..errors import TeacherAnswerError, TeacherUnavailable
from ..server_urls import without_login
from ..synthetic import GenerateConfig, run_pipeline
from .arguments import errors_without_traceback
from .dataclass_parser import DataclassParser


MOST_USED = (  # what `--help` shows first
    *("dataset_name", "teacher_model_name_or_path", "output_dir", "completions_per_prompt", "max_completion_length"),
    *("temperature", "reward_funcs", "keep", "pairs", "new_prompts"),
)


def main(config: GenerateConfig) -> None:
    console = foreign_text.console()
    disable_progress_bar()  # that of loading weights; there is one of our own
    try:
        counts = run_pipeline(config, console)
    except (TeacherAnswerError, TeacherUnavailable, ValueError) as error:
        sys.exit(f"{error}")  # it says what to change; a traceback would hide that
    except KeyboardInterrupt:
        sys.exit("Stopped. What is finished is kept: start the same command again to go on.")
    table = Table("stage", "unit", "in", "kept", "why the others were dropped")
    for stage in counts["stages"]:
        why = ", ".join(f"{reason}: {count}" for reason, count in stage["dropped"].items())
        table.add_row(stage["stage"], stage["unit"], str(stage["in"]), str(stage["kept"]), why)
    console.print(table)
    for line in counts.get("judge", {}).get("lines", []):
        console.print(line)
    for note in counts["notes"]:
        console.print(note, style="yellow")
    kept = without_login(config.work_dir) if config.work_dir else f"{config.output_dir.rstrip('/')}.work"
    console.print(
        f"{counts['rows']} rows are in {config.output_dir}, with a card in README.md. All completions are kept in "
        f"{kept}, so that filters may be changed; delete it when you are done.",
        soft_wrap=True,
    )


def parsed(arguments: list[str]) -> GenerateConfig:
    """The command line's settings, and a YAML file's that it names."""
    renamed = {"completions_per_prompt": "num_generations"}
    parser = DataclassParser([GenerateConfig], command="generate", text=__doc__, first=MOST_USED, renamed=renamed)
    with errors_without_traceback():
        (config,) = parser.parse_args_and_config(arguments)
    return config


def run(arguments: list[str]) -> None:
    """The command: its arguments, or a YAML file's that they name."""
    main(parsed(arguments))
