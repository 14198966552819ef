"""Every command and snippet of README and docs: run, or tagged with what it needs; and no flag that does not exist.

A block's tag is the HTML comment before it. `run`: as it stands, in an empty folder beside the scripts, page by page
(slow); `run: tiny`: Python, with tiny models in the place of those it names; `run by ...`: by what is named;
`needs: ...`: not run here, and why.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
from datasets import Dataset
from processes import succeeds
from transformers import AutoModelForCausalLM

import trl_distill
from trl_distill.cli.__main__ import COMMANDS
from trl_distill.config import OPDConfig as _OPDConfig
from trl_distill.training.trainer import OPDTrainer as _OPDTrainer


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {"GPU", "hub", "account", "network", "server", "time", "several machines", "models of your own"}


class Block(NamedTuple):
    page: str
    tag: str
    language: str
    text: str


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        pattern = r"^[ ]*(?:<!-- ([^\n]*?) -->\n[ ]*)?```(python|console)\n(.*?)^[ ]*```"
        for tag, language, text in re.findall(pattern, page.read_text(), re.DOTALL | re.MULTILINE):
            found.append(Block(page.name, tag, language, textwrap.dedent(text)))
    return found


def commands(text: str) -> list[str]:
    """What follows the prompts, continued lines joined, without what was printed."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


BLOCKS = blocks()


def test_every_block_says_how_it_is_run_or_what_it_needs():
    for block in BLOCKS:
        kind, _, rest = block.tag.partition(": ")
        needs = set(rest.split(", ")) if kind == "needs" else set()
        known = block.tag in ("run", "run: tiny") or block.tag.startswith("run by ") or (needs and needs <= NEEDS)
        assert known, f"{block.page}: {block.tag!r} before\n{block.text}"
        assert (block.tag == "run: tiny") <= (block.language == "python")
        assert (block.tag == "run") <= bool(block.language == "console" and commands(block.text))


@functools.cache
def help_of(command: str) -> str:
    """What a command, or a script that is none, says of its flags."""
    env = {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    program = [str(ROOT / command)] if command.endswith(".py") else ["-m", "trl_distill.cli", command]
    return succeeds([sys.executable, *program, "--help"], env=env)


AS_COMMAND = {"scripts/opd.py": "train"} | {f"scripts/{name}.py": name for name in COMMANDS}


def named_flags() -> list[tuple[str, str, str]]:
    """`(page, command, flag)` of every flag that follows one of our commands or scripts."""
    found = set()
    for block in BLOCKS:
        for line in commands(block.text) if block.language == "console" else ():
            words = shlex.split(line, comments=True)
            command = None
            for before, word in zip(["", *words], words, strict=False):
                if re.fullmatch(r"scripts/\w+\.py", word):
                    command = AS_COMMAND.get(word, word)
                elif before in ("trl-distill", "trl_distill.cli"):
                    assert word in COMMANDS, line
                    command = word
                elif word == "--" and command == "sweep":
                    command = "train"  # what follows is for the runs
                elif word.startswith("--") and command:
                    found.add((block.page, command, word.split("=")[0]))
    return sorted(found)


@pytest.mark.slow
def test_every_flag_exists():
    assert len(named_flags()) > 60
    missing = [row for row in named_flags() if not re.search(rf"{re.escape(row[2])}\b", help_of(row[1]))]
    assert not missing


RUN = {}
for _block in BLOCKS:
    if _block.tag == "run":
        RUN.setdefault(_block.page, []).extend(commands(_block.text))


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(RUN))
def test_every_command_of_a_page_runs(page, tmp_path):
    """In order, in an empty folder beside the scripts."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    for command in RUN[page]:
        succeeds(["bash", "-c", command], cwd=tmp_path, env=env)
    if page == "recipes.md":
        check_recipes(tmp_path / "recipe")


def check_recipes(folder: Path) -> None:
    """The student ends nearer to its teacher than it began, and is the better for it."""
    counts = json.loads((folder / "data" / "counts.json").read_text())
    assert 1900 < counts["rows"] <= 2000
    kl = {}
    for name in ("opd", "mixed", "combined"):
        log = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
        kl[name] = [row["distill/reverse_kl"] for row in log if "distill/reverse_kl" in row]
        AutoModelForCausalLM.from_pretrained(folder / name)
    assert kl["mixed"][-1] < 0.5 * kl["mixed"][0]
    assert kl["opd"][-1] < kl["mixed"][0]
    assert kl["combined"][-1] < kl["mixed"][0]
    models = json.loads((folder / "evaluation.json").read_text())["models"]
    found = {Path(name).name: one["estimates"] for name, one in models.items()}
    assert found["teacher"]["avg@4"]["value"] > 0.95
    assert found["opd"]["avg@4"]["low"] > found["student"]["avg@4"]["high"]
    assert found["opd"]["kl"]["value"] < found["sft"]["kl"]["value"]
    assert (folder / "runs.png").stat().st_size > 10_000


TINY = sorted({block.page for block in BLOCKS if block.tag == "run: tiny"})


@pytest.mark.parametrize("page", TINY)
def test_python_snippets_run(page, saved, prompts, tmp_path, monkeypatch):
    """One after another, in one namespace: names of models stand for tiny ones, `...` for what all trainers need."""
    from peft import LoraConfig

    student, teacher = str(saved / "student"), str(saved / "teacher")
    monkeypatch.chdir(tmp_path)
    tiny = {
        "output_dir": "out",
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
    }

    def config(**given):
        return _OPDConfig(**{**tiny, **given, "max_completion_length": 4})

    def trainer(**given):
        usual = {"model": student, "teacher_model": teacher, "args": config(), "train_dataset": prompts}
        real = {name: value for name, value in given.items() if value is not ...}
        if isinstance(given.get("teacher_model"), dict):  # the dataset says who judges
            usual["train_dataset"] = prompts.add_column("teacher", list(given["teacher_model"])[:1] * len(prompts))
        return _OPDTrainer(**{**usual, **real})

    monkeypatch.setattr(trl_distill, "OPDConfig", config)
    monkeypatch.setattr(trl_distill, "OPDTrainer", trainer)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Dataset.from_dict({"prompt": prompts["prompt"]}))
    names = {"Qwen/Qwen3-0.6B": student}
    names |= dict.fromkeys(("Qwen/Qwen3-4B", "org/math-7b", "org/code-7b"), teacher)
    space = {"OPDTrainer": trainer, "OPDConfig": config, "LoraConfig": LoraConfig}
    space |= {
        "StopOnSigterm": trl_distill.StopOnSigterm,
        "distributed_main": trl_distill.distributed_main,
        "my_reward": lambda completions, **_: [0.0] * len(completions),
    }
    for block in BLOCKS:
        if block.page == page and block.tag == "run: tiny":
            text = re.sub(r",\s*\.\.\.\)", ")", re.sub(r"\(\.\.\.(, |(?=\)))", "(", block.text))
            for name, path in names.items():
                text = text.replace(f'"{name}"', repr(path))
            exec(compile(text, page, "exec"), space)
    if page == "README.md":
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
