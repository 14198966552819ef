"""The end of a run, in the right order. What two processes do is in `distributed/test_ways_out.py`."""

from __future__ import annotations

import socket
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trl_distill import CheckpointError, NonFiniteLossError, StoppedBySignal, distributed_main
from trl_distill.training import process_group
from trl_distill.training.process_group import end_process_group


class Holder:
    """As a trainer: what wraps its model lies in a cycle with it."""

    def __init__(self):
        self.model_wrapped = DistributedDataParallel(nn.Linear(2, 2))
        self.itself = self
        self.model_wrapped(torch.ones(1, 2)).sum().backward()


@pytest.fixture
def group(monkeypatch, tmp_path):
    """A process group of one process; what is noted at its end: which of the wrappers still held it."""
    monkeypatch.setenv("WORLD_SIZE", "2")  # the decorator shall take itself for one of two
    monkeypatch.setattr(process_group, "_OtherProcesses", Alone)
    monkeypatch.setattr(process_group.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    Alone.calls.clear()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    held, alive, end = [], [], dist.destroy_process_group

    def destroy(*_):
        alive.extend(reference() for reference in held)
        Alone.calls.append("ended")
        end()

    monkeypatch.setattr(process_group.PartialState, "destroy_process_group", lambda self, *_: destroy())
    monkeypatch.setattr(
        process_group.PartialState, "wait_for_everyone", lambda self: Alone.calls.append("waited for everyone")
    )
    yield held, alive
    if dist.is_initialized():
        end()


class Alone:
    """In the place of the line to other processes."""

    calls: list[str] = []

    def __init__(self):
        self.calls.append("listens")

    def claim(self) -> bool:
        return True

    def tell(self) -> None:
        self.calls.append("told")

    def forget(self) -> None:
        self.calls.append("forgot")


def works(held, error: BaseException | None = None):
    @distributed_main
    def main():
        trainer = Holder()
        held.append(weakref.ref(trainer.model_wrapped))
        if error is not None:
            raise error

    return main


def test_the_wrapper_goes_before_the_group(group):
    held, alive = group
    works(held)()
    assert len(held) == 1
    assert alive == [None]
    assert Alone.calls == ["listens", "forgot", "ended"]


@pytest.mark.parametrize(
    ("error", "status", "way"),
    [
        (KeyError("x"), 1, "told"),
        (ValueError("x"), 1, "told"),
        (SystemExit("x"), 1, "told"),
        (KeyboardInterrupt(), 130, "told"),
        (NonFiniteLossError("x"), 1, "waited for everyone"),
        (StoppedBySignal("x"), 75, "waited for everyone"),
    ],
)
def test_also_where_an_error_ends_it(group, error, status, way, capfd):
    """The error's traceback holds the trainer until it is let go of."""
    held, alive = group
    with pytest.raises(SystemExit) as end:
        works(held, error)()
    assert end.value.code == status
    assert alive == [None]
    left = [call for call in Alone.calls if call not in ("listens", "forgot")]
    assert left == [way, "ended"]
    assert capfd.readouterr().err.count("x" if error.args else "Interrupted.") >= 1


def test_a_status_keeps_what_the_error_behind_it_says(group):
    @distributed_main
    def main():
        try:
            raise StoppedBySignal("stopped")
        except StoppedBySignal as error:
            raise SystemExit(75) from error

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 75
    assert "waited for everyone" in Alone.calls  # the status came from an error that all processes have met


def test_a_full_disk_while_stopping_is_one_process_alone(group):
    """The error that all processes met is behind it, and must not make this one wait for the others."""

    @distributed_main
    def main():
        try:
            raise StoppedBySignal("stopped")
        except StoppedBySignal:
            try:
                raise OSError("no space")
            except OSError as error:
                raise CheckpointError("not written") from error

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert "told" in Alone.calls
    assert "waited for everyone" not in Alone.calls


def test_it_listens_until_all_have_come(group):
    """Another process may fail on its way to the barrier."""
    with pytest.raises(SystemExit):
        works([], StoppedBySignal("x"))()
    assert Alone.calls == ["listens", "waited for everyone", "forgot", "ended"]


def test_a_dead_reference_somewhere_does_not_matter(group):
    dead = weakref.proxy(nn.Linear(1, 1))
    end_process_group()
    assert not dist.is_initialized()
    with pytest.raises(ReferenceError):
        dead.weight  # noqa: B018


def test_a_wrapper_that_somebody_still_holds_gives_up_the_group(group):
    trainer = Holder()
    reducer = trainer.model_wrapped.reducer
    assert reducer is not None
    del reducer
    end_process_group()
    assert trainer.model_wrapped.reducer is None
    assert not dist.is_initialized()


def test_one_process_is_left_as_it_is(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    error = KeyError("mine")

    @distributed_main
    def main():
        raise error

    with pytest.raises(KeyError) as raised:
        main()
    assert raised.value is error


def test_one_of_two_speaks_however_late_the_store_opens(monkeypatch):
    """A connection that pauses ever longer between its tries would miss a run of a few seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(process_group, "PATIENCE", 600.0)
    both = [process_group._OtherProcesses() for _ in range(2)]
    time.sleep(8)  # seconds in which nothing answers at the port
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    assert sorted(process.claim() for process in both) == [False, True]
    for process in both:
        process.forget()
    del store
