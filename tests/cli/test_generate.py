"""`trl-distill generate` as a user runs it; and `trl sft`, `trl dpo` and `trl-distill train` on its datasets."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from chat_server import ChatServer, wait_until
from processes import started, succeeds

from trl_distill.cli import generate
from trl_distill.data.datasets import load_splits
from trl_distill.synthetic import GenerateConfig


ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
TEACHER = SCRIPTS / "studies" / "tasks" / "models" / "teacher"
QUESTION = "State the final answer to the following arithmetic problem:"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the script in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def call(*arguments: str) -> dict[str, Any]:
        defaults = ("--dataset_name", "prompts.jsonl", "--output_dir", "out")
        generate.run([*defaults, *arguments])
        return json.loads(Path("out/counts.json").read_text())

    return call


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def read(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((folder / "data").iterdir()) for row in pq.read_table(path).to_pylist()]


def planted(size: int) -> list[Any]:
    """Problems of the demo, with duplicates, wrong answers and broken rows among them; all good ones are different."""
    from scripts.studies.tasks.additions import problems

    rows = list(problems(size, seed=77))
    few = size // 40
    equal = [{**row, "prompt": _asked(row, lambda text: f"  {text.upper()} ")} for row in rows[:few]]
    near = [{**row, "prompt": _asked(row, "State {}".format)} for row in rows[few : 2 * few]]
    wrong = [{**row, "answer": row["answer"] + "0", "kind": "wrong"} for row in problems(few, seed=78)]
    bad = ["{broken", {"prompt": []}, {"answer": "1"}, ""]
    mixed = [*equal, *near, *wrong]
    random.Random(0).shuffle(mixed)
    return [*({**row, "kind": "good"} for row in rows), *mixed, *bad]


def _asked(row: dict[str, Any], change: Any) -> list[dict[str, str]]:
    return [{"role": "user", "content": change(row["prompt"][0]["content"])}]


def check_planted(folder: Path, rows: list[Any]) -> None:
    """Planted duplicates and wrong answers are gone, good rows are there, and every stage accounts for all rows."""
    counts = json.loads((folder / "counts.json").read_text())
    stages = {stage["stage"]: stage for stage in counts["stages"]}
    for before, after in (("read", "equal prompts"), ("equal prompts", "ask the teachers"), ("verify", "filter")):
        assert stages[before]["kept"] == stages[after]["in"]
    for before, after in (("filter", "keep correct"), ("keep correct", "duplicates")):
        assert stages[before]["kept"] == stages[after]["in"]
    assert all(stage["in"] == stage["kept"] + sum(stage["dropped"].values()) for stage in counts["stages"])
    good = [row for row in rows if isinstance(row, dict) and row.get("kind") == "good"]
    few = len(good) // 40
    assert stages["read"]["in"] == len(rows)
    assert sum(stages["read"]["dropped"].values()) == 4
    assert stages["equal prompts"]["dropped"] == {"equal to an earlier prompt": few}
    found = read(folder)
    assert len(found) == counts["rows"] == stages["duplicates"]["kept"]
    prompts = [row["prompt"][0]["content"] for row in found]
    assert len(set(prompts)) == len(prompts)
    assert not any(row["kind"] == "wrong" for row in found)
    assert all(row["completion"][0]["content"].endswith(f"answer {row['answer']}") for row in found)
    # of a near duplicate and its original one is left, if the teacher was right at all
    assert not {p.removeprefix("State ") for p in prompts if p.startswith("State State")} & set(prompts)
    assert stages["duplicates"]["dropped"] == {"near duplicate": pytest.approx(few, abs=2)}
    # a good row is missing only where the teacher was wrong
    missed = len({row["prompt"][0]["content"] for row in good} - set(prompts))
    dropped = sum(stages["keep correct"]["dropped"].values()) + sum(stages["filter"]["dropped"].values())
    assert missed <= dropped - few < len(good) * 0.03


PIPELINE = (
    *("--teacher_model_name_or_path", str(TEACHER), "--max_completion_length", "64"),
    *("--reward_funcs", "scripts.studies.tasks.additions.correct", "--keep", "correct"),
)


def test_the_demos_teacher(run, tmp_path, capsys):
    rows = planted(120)
    write(tmp_path / "prompts.jsonl", rows)
    run(*PIPELINE, "--chunk_size", "50")
    check_planted(tmp_path / "out", rows)
    shown = capsys.readouterr().out
    assert "rows are in out, with a card in README.md" in shown
    assert "score below 1" in shown
    assert load_splits("out")["train"].to_list() == read(tmp_path / "out")
    assert "| line 130 | broken JSON |" in (tmp_path / "out" / "README.md").read_text()


def test_settings_from_a_yaml_file(run, tmp_path):
    write(tmp_path / "prompts.jsonl", [{"prompt": [{"role": "user", "content": f"{QUESTION} 1234 + 5678 ="}]}])
    with ChatServer(lambda text, seed: f"I see {text}") as server:
        (tmp_path / "settings.yaml").write_text(
            f"teacher_models:\n  small: {TEACHER}\n  served: {server.url}/v1#m\nmax_completion_length: 64\n"
        )
        counts = run("--config", "settings.yaml")
    assert counts["writers"] == {"small": 1, "served": 1}


def test_a_judge(run, tmp_path):
    write(tmp_path / "prompts.jsonl", [{"prompt": f"{i} + {i}", "gold": str(2 * i)} for i in range(6)])
    (tmp_path / "ask.txt").write_text("Is {completion} the same as {gold}?")

    def judge(text, seed):
        first, second = text.removeprefix("Is ").removesuffix("?").split(" the same as ")
        return f"Score: {float(first == second)}"

    with (
        ChatServer(lambda text, seed: str(int(text.split()[0]) * 2 + (text[0] == "4"))) as teacher,
        ChatServer(judge) as j,
    ):
        counts = run(
            *("--teacher_model_name_or_path", f"{teacher.url}#t", "--judge", f"{j.url}#j"),
            *("--judge_prompt", "ask.txt", "--keep", "correct"),
        )
    assert counts["rows"] == 5
    assert "4 + 4" not in [row["prompt"] for row in read(tmp_path / "out")]


def test_errors_are_said_without_a_traceback(run, tmp_path, monkeypatch):
    write(tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    with pytest.raises(SystemExit, match="nowhere"):
        run("--teacher_model_name_or_path", "nowhere")
    with ChatServer(lambda text, seed: "x") as server:
        url = server.url
    with pytest.raises(SystemExit, match=r"tried 1 times.*start the same command again"):
        run("--teacher_model_name_or_path", f"{url}#m", "--retries", "0", "--output_dir", "other")


def test_an_endpoint_that_fails_half_way_loses_nothing(run, tmp_path):
    write(tmp_path / "prompts.jsonl", [{"prompt": f"prompt {i}"} for i in range(20)])

    def refuse_the_third_chunk(text: str) -> int | None:
        """And those after it, but not before the first two are finished."""
        if int(text.removeprefix("prompt ")) < 8:
            return None
        wait_until(lambda: len(list(tmp_path.glob("out.work/completions/*/*.jsonl"))) == 2)
        return 500

    with ChatServer(lambda text, seed: f"{text} is answered {seed}") as server:
        settings = ("--teacher_models", json.dumps({"m": f"{server.url}#m"}), "--chunk_size", "4", "--retries", "0")
        server.refuse = refuse_the_third_chunk
        with pytest.raises(SystemExit, match="HTTP 500"):
            run(*settings)
        assert not (tmp_path / "out").exists()
        again: list[str] = []
        server.refuse = lambda text: again.append(text) or (400 if text == "prompt 13" else None)
        counts = run(*settings)
        assert len(again) == 12
        assert not {f"prompt {i}" for i in range(8)} & set(again)
        assert counts["rows"] == 19
        interrupted = read(tmp_path / "out")
        run(*settings, "--output_dir", "whole")
        assert read(tmp_path / "whole") == interrupted
    assert "prompt 13, teacher m" in (tmp_path / "out" / "README.md").read_text()


def environment(tmp_path: Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")}


@pytest.mark.slow
def test_killed_ten_times_it_makes_the_dataset_of_an_uninterrupted_run(tmp_path, monkeypatch):
    """2,000 problems of the demo and what is planted among them; `kill -9` at random moments."""
    rows = planted(2000)
    write(tmp_path / "prompts.jsonl", rows)
    command = [sys.executable, str(SCRIPTS / "generate.py"), "--dataset_name", "prompts.jsonl", *PIPELINE]
    command += ["--batch_size", "32", "--chunk_size", "32", "--output_dir"]
    how: dict[str, Any] = {"cwd": tmp_path, "env": environment(tmp_path)}
    succeeds([*command, "whole"], **how)
    check_planted(tmp_path / "whole", rows)

    draw, kills, work = random.Random(int(time.time())), 0, tmp_path / "killed.work"
    for _ in range(30):
        if kills == 10:
            break
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)  # too late for the last kill: the end is made again
        before = _touched(work)
        with started([*command, "killed"], stdout=subprocess.DEVNULL, **how) as process:
            while process.poll() is None and _touched(work) == before:
                time.sleep(0.02)  # loading libraries; nothing can be lost yet
            time.sleep(draw.uniform(0, 2.5))
        kills += process.returncode == -signal.SIGKILL  # the end of the block has killed it
    assert kills == 10
    succeeds([*command, "killed"], **how)
    assert read(tmp_path / "killed") == read(tmp_path / "whole")
    for name in ("counts.json", "README.md", "skipped.jsonl"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()


def _touched(folder: Path) -> tuple[int, float]:
    """Changes whenever something in a folder does."""
    found = [entry.stat().st_mtime for entry in folder.rglob("*") if entry.exists()] if folder.exists() else []
    return len(found), max(found, default=0.0)


@pytest.mark.slow
def test_what_reads_the_dataset(run, tmp_path):
    """`trl sft` and `scripts/opd.py` on completions, `trl dpo` on pairs: two steps each, as processes of their own."""
    from scripts.studies.tasks.additions import problems

    write(tmp_path / "prompts.jsonl", list(problems(40, seed=3)))
    teacher = ("--teacher_model_name_or_path", str(TEACHER), "--max_completion_length", "64")
    run(*teacher)
    student = str(SCRIPTS / "studies" / "tasks" / "models" / "student")
    pairs = ("--num_generations", "4", "--temperature", "1.5", "--pairs", "--keep_truncated")
    run(*teacher, *pairs, "--reward_funcs", "scripts.studies.tasks.additions.correct", "--output_dir", "pairs")
    common = ["--max_steps", "2", "--use_cpu", "--bf16", "false", "--report_to", "none", "--save_strategy", "no"]
    common += ["--gradient_checkpointing", "false", "--per_device_train_batch_size", "2"]
    trl = [str(Path(sys.executable).with_name("trl"))]
    for command, folder in (
        ([*trl, "sft", "--model_name_or_path", student], "out"),
        ([*trl, "dpo", "--model_name_or_path", student], "pairs"),
        (
            [sys.executable, str(SCRIPTS / "opd.py"), "--model_name_or_path", student, *teacher],
            "out",
        ),
    ):
        arguments = [*command, "--dataset_name", folder, "--output_dir", f"trained_{folder}", *common]
        succeeds(arguments, cwd=tmp_path, env=environment(tmp_path))


def test_the_last_line_says_where_the_completions_are_without_keys(monkeypatch, capsys):
    monkeypatch.setattr(generate, "run_pipeline", lambda config, console: {"stages": [], "notes": [], "rows": 2})
    given = {"dataset_name": "a.jsonl", "output_dir": "out/", "teacher_model_name_or_path": "m"}
    generate.main(GenerateConfig(**given))
    assert "kept in out.work, so" in capsys.readouterr().out
    generate.main(GenerateConfig(**given, work_dir="s3://key:sesame@bucket/run"))
    assert "kept in s3://***@bucket/run, so" in capsys.readouterr().out
