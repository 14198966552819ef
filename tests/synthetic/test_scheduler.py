"""Tasks of a plan: no barrier between chunks, one model in this process at a time, errors, and shares of workers."""

from __future__ import annotations

import gc
import threading
import time

import pytest
from chat_server import ChatServer

from trl_distill.synthetic.make_chunks import ChunkMaker, work_folder
from trl_distill.synthetic.make_chunks import _at_once as at_once
from trl_distill.synthetic.scheduler import Scheduler, chunks_at_once
from trl_distill.synthetic.sources.load import load_source


class Stage:
    """Notes what is done; `act` is called for each chunk."""

    def __init__(self, name, remote, log, act=lambda number: None, there=()):
        self.name, self.remote, self.log, self.act = name, remote, log, act
        self.there = set(there)

    def load(self):
        self.log.append((self.name, "load"))
        return self

    def close(self):
        self.log.append((self.name, "close"))

    def finished(self):
        return set(self.there)

    def make(self, worker, number):
        self.act(number)
        self.log.append((self.name, number))


def run(*layers, chunks=4, at_once=2):
    shown = []
    Scheduler(layers, range(chunks), at_once, lambda stage, done: shown.append((stage.name, done))).run()
    return shown


def test_a_chunk_goes_on_while_another_is_still_at_an_earlier_stage():
    log, passed = [], threading.Event()

    def waits(number):
        if number == 1:
            assert passed.wait(60)  # until chunk 0 or 2 has come through the second stage

    second = Stage("b", True, log, lambda number: passed.set() if number != 1 else None)
    run([Stage("a", True, log, waits)], [second])
    assert sorted(step for step in log if isinstance(step[1], int)) == [(n, i) for n in "ab" for i in range(4)]
    assert log.index(("b", 1)) > log.index(("a", 1)) > log.index(("b", 0))


def test_remote_chunks_are_under_way_at_once_and_no_more_than_said():
    now, most, lock, both = 0, 0, threading.Lock(), threading.Barrier(2)

    def act(number):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        if number in (1, 2):
            both.wait(60)
        with lock:
            now -= 1

    run([Stage("a", True, [], act)], chunks=9, at_once=2)
    assert most == 2


def test_models_in_this_process_take_turns_in_the_main_thread():
    log, threads = [], set()
    note = lambda number: threads.add(threading.current_thread())  # noqa: E731
    first, second = Stage("a", False, log, note), Stage("b", False, log, note)
    run([first], [second], chunks=2)
    assert log == [(n, what) for n in "ab" for what in ("load", 0, 1, "close")]
    assert threads == {threading.main_thread()}


def test_what_is_there_is_not_made_again_and_nobody_is_loaded_for_it():
    log = []
    shown = run([Stage("a", True, log, there=range(4))], [Stage("b", False, log, there=[1])])
    assert [step for step in log if step[0] == "a"] == []
    assert [step for step in log if step[0] == "b"] == [("b", "load"), ("b", 0), ("b", 2), ("b", 3), ("b", "close")]
    assert shown == [("a", 4), ("b", 1), ("b", 2), ("b", 3), ("b", 4)]


def test_imports_are_no_work_for_the_garbage_collector_while_it_runs():
    frozen = []
    run([Stage("a", True, [], lambda number: frozen.append(gc.get_freeze_count()))])
    assert min(frozen) > 10_000
    assert gc.get_freeze_count() == 0


def test_what_the_caller_has_frozen_stays_frozen():
    gc.freeze()
    try:
        run([Stage("a", True, [])])
        assert gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("remote", [True, False])
def test_the_first_error_ends_the_run_and_nothing_is_written_after_it(remote):
    log = []

    def fails(number):
        if number == 1:
            raise ValueError("chunk 1")
        time.sleep(0.2)  # all 50 in two threads: five seconds

    with pytest.raises(ValueError, match="chunk 1"):
        run([Stage("a", remote, log, fails)], [Stage("b", True, log)], chunks=50)
    size = len(log)
    assert ("a", "close") in log
    assert size < 50
    assert len(log) == size


def test_requests_for_the_next_chunk_wait_while_the_last_of_one_are_answered():
    assert chunks_at_once(64, 64) * 64 >= 2 * 64
    assert chunks_at_once(1, 64) == 3
    assert chunks_at_once(100, 4) * 4 >= 100


def test_one_slow_answer_in_each_of_several_chunks_does_not_leave_the_endpoint_idle(bench):
    """Three chunks wait for one answer each, until a chunk far behind them is asked about."""
    bench.prompts([{"prompt": [{"role": "user", "content": f"word {i}"}]} for i in range(40)])
    far = threading.Event()

    def answer(text, seed):
        number = int(text.split()[1])
        if number == 30:
            far.set()
        if number in (4, 8, 12) and not far.wait(60):
            server.refuse = lambda text: 503
        return text

    with ChatServer(answer) as server:
        bench.run(teacher_models={"m": f"{server.url}#m"}, concurrency=4, retries=0)
    assert far.is_set()


def test_enough_chunks_for_all_endpoints_of_a_model_and_for_a_share_of_the_prompts(bench):
    config = bench.config(teacher_model_name_or_path="http://a/v1#m, http://b/v1#m", concurrency=64, chunk_size=64)
    assert at_once(config) * 64 >= 2 * 64 * 2
    shares = {"teacher_models": {"a": "http://a/v1#m", "b": "http://b/v1#m"}, "teacher_assignment": "rotate"}
    config = bench.config(**shares, concurrency=64, chunk_size=64)
    assert at_once(config) * 32 >= 2 * 64
    assert at_once(bench.config(judge="http://a/v1#j,http://b/v1#j", concurrency=64)) * 64 >= 2 * 64 * 2


def test_any_share_of_the_work_makes_the_same_files(bench):
    """Two workers, one after the other in one process, each with its chunks; and one process with all."""
    bench.prompts([{"prompt": [{"role": "user", "content": f"word {i}"}]} for i in range(18)])
    with ChatServer(lambda text, seed: f"{text} at {seed}") as server:
        settings = {"teacher_models": {"m": f"{server.url}#m"}, "new_prompts": 0}
        bench.run(**settings)
        whole = files(bench)
        for path in (bench.folder / "out.work" / "completions").rglob("*.jsonl"):
            path.unlink()
        config = bench.config(**settings)
        for rank in (1, 0):
            maker = ChunkMaker(config, work_folder(config), None, load_source)
            maker.make(range(rank, len(maker.prompts), 2))
            assert len(files(bench)) == (2 if rank else 5)
    assert files(bench) == whole


def files(bench):
    return {path.name: path.read_text() for path in (bench.folder / "out.work" / "completions").rglob("*.jsonl")}
