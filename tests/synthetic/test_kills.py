"""A run killed with SIGKILL at random moments, on one process and on two, ends with the uninterrupted dataset."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager

import psutil
import pyarrow.parquet as pq
import pytest
from chat_server import ChatServer
from processes import started, succeeds, wait_until_gone


PROMPTS = 60


SLOW = 0.02  # seconds for an answer, so that a run takes some


@contextmanager
def endpoints(count):
    """Servers that answer each prompt and seed in one way, whichever is asked."""

    def answer(text, seed):
        time.sleep(SLOW)
        return f"Score: {seed % 2}" if "Judge" in text else f"{text} is answered with {seed}"

    servers = [ChatServer(answer) for _ in range(count)]
    for server in servers:
        server.__enter__()
    try:
        yield servers
    finally:
        for server in servers:
            server.stop()


def command(folder, servers, workers):
    teacher = ", ".join(f"{server.url}#m" for server in servers)
    settings = {
        **{"dataset_name": f"{folder}/prompts.jsonl", "output_dir": f"{folder}/out", "workers": workers},
        **{"teacher_models": json.dumps({"big": teacher}), "chunk_size": 4, "concurrency": 2, "retries": 0},
        **{"judge": f"{servers[0].url}#m", "num_generations": 2, "keep": "best", "near_duplicates": 0},
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "trl_distill.cli", "generate", *words]


def dataset(folder):
    rows = [row for path in sorted((folder / "out" / "data").iterdir()) for row in pq.read_table(path).to_pylist()]
    counts = json.loads((folder / "out" / "counts.json").read_text())
    return rows, counts["stages"], (folder / "out" / "skipped.jsonl").read_text()


def write(folder):
    folder.mkdir(exist_ok=True)
    rows = [{"prompt": [{"role": "user", "content": f"question {i} of many"}]} for i in range(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def kill(process, draw, workers, folder):
    """One worker, where there are some and the dice say so; else all."""
    family = psutil.Process(process.pid).children(recursive=True)
    victims = [one for one in family if "trl_distill.synthetic.workers" in " ".join(one.cmdline())]
    if victims:
        (folder / "seen").touch()
    if victims and draw.random() < 0.5:
        draw.choice(sorted(victims, key=lambda one: one.pid)).kill()
        return False
    os.kill(process.pid, signal.SIGKILL)
    return True


def check_kills(folder, workers, times, seed):
    with endpoints(2) as servers:
        write(folder)
        succeeds(command(folder, servers, 1))
        expected = dataset(folder)
        assert len(expected[0]) == PROMPTS
        asked = sum(len(server.asked) for server in servers)
        shutil.rmtree(folder / "out")
        shutil.rmtree(folder / "out.work")
        draw, killed = random.Random(seed), 0
        while killed < times and not (folder / "out").exists():
            with started(command(folder, servers, workers)) as process:
                deadline = time.monotonic() + 600
                before = finished(folder)
                wanted = before + draw.randint(1, 3)  # files come before the kill
                while process.poll() is None and finished(folder) < wanted and time.monotonic() < deadline:
                    time.sleep(0.005)
                time.sleep(draw.random() * 4 * SLOW)
                if process.poll() is None:
                    killed += 1
                    if kill(process, draw, workers, folder):
                        process.wait()
                    else:
                        assert process.wait() == 0
        assert killed >= min(times, 2)
        assert not workers > 1 or (folder / "seen").exists()  # of a worker
        succeeds(command(folder, servers, workers))
        assert dataset(folder) == expected
        again = sum(len(server.asked) for server in servers) - asked
        most = 2 * asked  # of a chunk that was not finished, what was answered is asked again
        assert asked <= again < most


def finished(folder):
    names = [name for _, _, names in os.walk(folder / "out.work") for name in names]  # folders may go meanwhile
    return sum(name.endswith(".jsonl") for name in names)


@pytest.mark.slow
def test_a_run_that_is_killed_gives_the_uninterrupted_dataset(tmp_path):
    check_kills(tmp_path, workers=1, times=1, seed=1)


@pytest.mark.parametrize(
    ("workers", "sign"),
    [(1, signal.SIGINT), (2, signal.SIGINT), pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_a_stopped_run_ends_at_once_with_all_its_workers(tmp_path, workers, sign):
    """Although the endpoint answers after minutes."""
    write(tmp_path)
    release = threading.Event()

    def answer(text, seed):
        release.wait(600)
        return text

    with ChatServer(answer) as server:
        with started(command(tmp_path, [server], workers)) as process:
            end = time.monotonic() + 300
            while len(server.asked) < workers and time.monotonic() < end:
                time.sleep(0.05)
            assert len(server.asked) >= workers
            os.kill(process.pid, sign)
            assert process.wait(timeout=60) != 0
            assert wait_until_gone(process, 60) == []
        release.set()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_is_killed_ten_times_gives_the_uninterrupted_dataset(tmp_path, workers):
    check_kills(tmp_path, workers, times=10, seed=10 + workers)
