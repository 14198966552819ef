"""Workers on Ray, through datatrove, one of which is killed; and what is said before anything is started."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from chat_server import ChatServer
from processes import succeeds


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


@pytest.mark.slow
def test_a_worker_on_ray_is_killed_and_the_dataset_is_that_of_one_process(bench):
    assert PACKAGES.is_dir(), "run `make test-slow`, which installs datatrove and Ray there"
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
    """Kill one of Ray's workers after two chunks are finished."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and not killed:
        if len(list(work.glob("completions/*/*.jsonl"))) >= 2:
            for process in psutil.Process().children(recursive=True):
                try:
                    if "RankWorker" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
                        return
                except psutil.Error:
                    continue
        time.sleep(0.02)
