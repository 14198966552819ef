"""Workers on Ray, through datatrove, one of which is killed; and what is said before anything is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest
from chat_server import ChatServer
from processes import succeeds

from trl_distill.synthetic import engines
from trl_distill.synthetic.stages.ingest import Ingest, read_rows
from trl_distill.synthetic.work_folder import WorkFolder


PACKAGES = Path(__file__).parents[2] / ".venv-engines"  # apart: few need them, and Ray is large


CHATS = [{"prompt": [{"role": "user", "content": f"question {i} of many"}]} for i in range(40)]


RUN = """
import json, sys
from trl_distill.synthetic import GenerateConfig, run_pipeline
run_pipeline(GenerateConfig(**json.loads(sys.argv[1])))
"""


@pytest.mark.parametrize("engine", ["slurm", "ray"])
def test_an_engine_that_is_not_installed_is_named(bench, engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove.executor", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    bench.prompts(CHATS[:4])
    bench.teach(lambda prompt, seed, model: "words")
    with pytest.raises(ValueError, match=r"which is not installed.*trl_distill\[engines\]"):
        bench.run(engine=engine, workers=2)


def test_a_secret_is_not_written_into_the_file_of_a_job(bench):
    bench.prompts(CHATS[:4])
    bench.teach(lambda prompt, seed, model: "words")
    with pytest.raises(ValueError, match="hold a secret") as error:
        bench.run(engine="slurm", workers=2, teacher_models={"m": "http://user:sesame@host:1/v1#m"})
    assert "sesame" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "kubernetes"}, "`engine='kubernetes'` is not known"),
        ({"engine": "ray"}, "`workers` is 1"),
        ({"engine_options": {"partition": "gpu"}}, "`engine_options` are Slurm's or Ray's"),
        ({"workers": 0}, "`workers` is 0"),
        ({"keep_reasoning": "yes"}, "`keep_reasoning='yes'` is not known"),
    ],
)
def test_wrong_settings_of_the_engine(bench, changes, message):
    with pytest.raises(ValueError, match=message):
        bench.config(**changes)


def test_a_queue_that_does_not_answer_is_asked_again(tmp_path, monkeypatch):
    said = [(0, "12 gpu R", ""), (1, "", "slurm_load_jobs error: Socket timed out"), (0, "", "")]
    said += [(1, "", "slurm_load_jobs error: Invalid job id specified")]
    monkeypatch.setattr(subprocess, "run", lambda words, **how: subprocess.CompletedProcess(words, *said.pop(0)))
    assert [engines._is_queued("12") for _ in range(4)] == [True, True, False, False]


def test_jobs_are_cancelled_with_the_run_that_waits_for_them(monkeypatch):
    asked = []

    class Executor:
        job_id = "12"

        def __init__(self, pipeline, job_name, **options):
            pass

        def run(self):
            pass

    def queue(words, **how):
        asked.append(words[0])
        if words[0] == "squeue":
            raise KeyboardInterrupt
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setitem(sys.modules, "datatrove", ModuleType("datatrove"))
    monkeypatch.setitem(sys.modules, "datatrove.executor", SimpleNamespace(SlurmPipelineExecutor=Executor))
    monkeypatch.setattr(subprocess, "run", queue)
    with pytest.raises(KeyboardInterrupt):
        engines._run_on_slurm([], {})
    assert asked == ["squeue", "scancel"]


def test_a_rank_that_is_killed_in_an_engine_is_started_again(bench):
    """In a process of its own, so that the engine's, which would wait for ever, lives on."""
    bench.prompts(CHATS)
    killed = threading.Event()

    def answer(text, seed):
        if text == "question 17 of many" and not killed.is_set():
            killed.set()
            for process in psutil.Process().children(recursive=True):
                if "trl_distill.synthetic.workers" in " ".join(process.cmdline()):
                    process.kill()
        return f"{text} is answered with {seed}"

    with ChatServer(answer) as server:
        settings = {"teacher_models": {"m": f"{server.url}#m"}, "concurrency": 2}
        config = bench.config(**settings, workers=3)
        Ingest(WorkFolder(bench.folder / "out.work"), 4).run(read_rows(config.dataset_name))
        engines._task(asdict(config), None, 1, 3)
    assert killed.is_set()
    made = sorted(path.name for path in (bench.folder / "out.work" / "completions" / "0").glob("*.jsonl"))
    assert made == [f"{number:06}.jsonl" for number in (1, 4, 7)]


@pytest.mark.slow
@pytest.mark.long
def test_a_worker_on_ray_is_killed_and_the_dataset_is_that_of_one_process(bench):
    assert PACKAGES.is_dir(), "run `make test-long`, which installs datatrove and Ray there"
    bench.prompts(CHATS)

    def answer(text, seed):
        time.sleep(0.05)
        return f"{text} is answered with {seed}"

    with ChatServer(answer) as server:
        settings = {"teacher_models": {"m": f"{server.url}#m"}, "concurrency": 2}
        bench.run(**settings)
        expected, bench.out = bench.rows(), bench.folder / "ray"
        config = bench.config(**settings, engine="ray", workers=2, engine_options={"mem_per_cpu_gb": 1})
        given = {"dataset_name": config.dataset_name, "output_dir": config.output_dir, "chunk_size": 4, **settings}
        given |= {"engine": "ray", "workers": 2, "engine_options": config.engine_options}
        path = os.pathsep.join([*filter(None, sys.path), str(PACKAGES)])
        killed: list[int] = []
        killer = threading.Thread(target=kill_a_worker, args=(bench.folder / "ray.work", killed), daemon=True)
        killer.start()
        env = {**os.environ, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
        succeeds([sys.executable, "-c", RUN, json.dumps(given)], env=env)
        killer.join()
    assert killed
    assert bench.rows() == expected


def kill_a_worker(work, killed):
    """Kill a worker on Ray after two chunks are finished."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and not killed:
        if len(list(work.glob("completions/*/*.jsonl"))) >= 2:
            for process in psutil.Process().children(recursive=True):
                try:
                    if "trl_distill.synthetic.workers" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
                        return
                except psutil.Error:
                    continue
        time.sleep(0.02)
