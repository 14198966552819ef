"""The helper that starts processes for tests kills those alone."""

from __future__ import annotations

import os
import sys

import processes


def test_a_process_without_a_mark_belongs_to_no_test(monkeypatch):
    """Until a process has begun, its environment is empty, like that of every process of somebody else."""
    killed = []
    monkeypatch.setattr(processes, "_mark_of", lambda pid: None)
    monkeypatch.setattr(os, "kill", lambda *given: killed.append(given))
    with processes.started([sys.executable, "-c", ""]) as process:
        assert process.wait(600) == 0
        assert processes.running(process) == []
    assert not killed
