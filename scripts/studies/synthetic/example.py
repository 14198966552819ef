"""A true example of the data engine, end to end, with a weak model: SmolLM2-135M-Instruct as teacher and judge.

    python -m scripts.studies.pretrained.run --prepare                            # makes pretrained_output/teacher
    python -m scripts.studies.synthetic.example --model pretrained_output/teacher # on a GPU where there is one

24 prompts are rewritten once (`--evolve`) and completed twice each. From the same completions, in one work folder, come
four datasets: all of them (`all`), the better one of each prompt by pairwise comparison (`best`), pairs of the better
and the worse one (`preferences`), and pairs of a revision and its draft (`revised`). `trl sft` and `trl dpo` read them,
with a tiny random model. Half of the prompts ask for a capital, so it is known which drafts and revisions are right; 20
labelled pairs show how good the judge is.

The results are written to docs/results/synthetic/example.json, dataset by dataset. If interrupted, rerun the command to
resume.
"""

from __future__ import annotations

from scripts.studies.startup import ONE_THREAD, prepare_environment  # before the libraries


prepare_environment(OMP_NUM_THREADS=ONE_THREAD, TOKENIZERS_PARALLELISM="false")

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from scripts.studies.synthetic.example_data import JUDGE_PROMPT, labelled_pairs, prompts
from trl_distill.synthetic import GenerateConfig, run_pipeline
from trl_distill.synthetic.text import content


OUT = Path(__file__).resolve().parents[3] / "docs" / "results" / "synthetic" / "example.json"


COMMON = {"evolve": 1, "completions_per_prompt": 2, "max_completion_length": 64, "temperature": 0.7, "batch_size": 24}


DATASETS: dict[str, dict[str, Any]] = {
    "all": {},
    "best": {"judge": True, "keep": "best"},
    "preferences": {"judge": True, "pairs": True},
    "revised": {"revise": "default", "pairs": True, "keep_drafts": True},
}


READERS = {"all": "sft", "best": "sft", "preferences": "dpo", "revised": "dpo"}


def settings_of(name: str, model: str, work: Path) -> dict[str, Any]:
    """The settings of one dataset; all three share the work folder, and with it the completions."""
    given = {**COMMON, **DATASETS[name], "dataset_name": str(work / "prompts.jsonl"), "output_dir": str(work / name)}
    given |= {"teacher_model_name_or_path": model, "work_dir": str(work / "work"), "chunk_size": 24}
    if given.pop("judge", False):
        given |= {"judge": model, "judge_mode": "pairwise", "judge_prompt": str(work / "judge.txt")}
        given |= {"judge_check": str(work / "labelled.jsonl")}
    return given


def write_inputs(work: Path) -> None:
    """Prompts, labelled pairs and the judge's question."""
    work.mkdir(parents=True, exist_ok=True)
    for name, rows in (("prompts", prompts()), ("labelled", labelled_pairs())):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (work / "judge.txt").write_text(JUDGE_PROMPT)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a dataset."""
    return [row for path in sorted((folder / "data").iterdir()) for row in pq.read_table(path).to_pylist()]


def last(messages: Sequence[dict[str, Any]]) -> str:
    """The text of the last message."""
    return content(messages[-1])


def looks_like_a_prompt(text: str) -> bool:
    """Whether a rewrite asks something or tells somebody to do something, as far as its form shows."""
    first = text.split()[0].strip("\"'“").casefold()
    verbs = "ask compare create describe design develop discuss explain find give identify list make name tell write"
    return "?" in text or first in verbs.split()


def rewrites(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each rewritten prompt once, with where it comes from."""
    made = {last(row["prompt"]): row for row in rows if row["evolution"]}
    return [
        {"from": row["evolved_from"], "operation": row["evolution"][-1], "to": text, "asks": looks_like_a_prompt(text)}
        for text, row in made.items()
    ]


def right_answers(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the pairs about capitals, how many revisions and drafts name the right one."""
    known = [row for row in rows if row["answer"]]
    drafts = [row["answer"] in last(row["rejected"]) for row in known]
    revisions = [row["answer"] in last(row["chosen"]) for row in known]
    both = list(zip(drafts, revisions, strict=True))
    return {
        "pairs": len(known),
        "right_drafts": sum(drafts),
        "right_revisions": sum(revisions),
        "mended": both.count((False, True)),
        "spoilt": both.count((True, False)),
    }


def tiny_student(model: str, folder: Path) -> Path:
    """A random model of two narrow layers with the teacher's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(command: str, student: Path, dataset: Path) -> dict[str, Any]:
    """Two steps of `trl sft` or `trl dpo` on a dataset; the loss of each."""
    out = dataset.with_name(f"trained_{dataset.name}")
    words = [str(Path(sys.executable).with_name("trl")), command, "--model_name_or_path", str(student)]
    words += ["--dataset_name", str(dataset), "--output_dir", str(out), "--max_steps", "2", "--logging_steps", "1"]
    words += ["--use_cpu", "--bf16", "false", "--report_to", "none", "--gradient_checkpointing", "false"]
    words += ["--per_device_train_batch_size", "2", "--save_strategy", "steps", "--save_steps", "2"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(f"`trl {command}` failed on {dataset}:\n{done.stderr[-3000:]}")
    log = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    return {"command": f"trl {command}", "losses": [round(row["loss"], 4) for row in log if "loss" in row]}


def summary(name: str, work: Path) -> dict[str, Any]:
    """What is told of one dataset: its counts, and what its rows show."""
    counts, rows = json.loads((work / name / "counts.json").read_text()), rows_of(work / name)
    found = {key: counts[key] for key in ("rows", "stages", "judge", "notes") if key in counts}
    if name == "all":
        found["rewrites"] = rewrites(rows)
    if name == "revised":
        found["capitals"] = right_answers(rows)
        found["shown"] = [
            {"prompt": last(row["prompt"]), "draft": last(row["rejected"]), "critique": row["critique"][-1]}
            | {"principle": row["principle"][-1], "revision": last(row["chosen"])}
            for row in rows[:3]
        ]
    return found


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder or hub name of the teacher, which is the judge, too.")
    parser.add_argument("--work", type=Path, default=Path("example_output"), help="Folder of everything that is made.")
    parser.add_argument("--out", type=Path, default=OUT, help="File of the results.")
    given = parser.parse_args(words)
    write_inputs(given.work)
    student = tiny_student(given.model, given.work / "student")
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread"
    found: dict[str, Any] = {"machine": machine}
    for name in DATASETS:
        counts = run_pipeline(GenerateConfig(**settings_of(name, given.model, given.work)))
        print(f"{name}: {counts['rows']} rows, see {given.work / name / 'README.md'}", flush=True)
        found[name] = {**summary(name, given.work), "read_by": train(READERS[name], student, given.work / name)}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    print(f"The results are in {given.out}.")


if __name__ == "__main__":
    main()
