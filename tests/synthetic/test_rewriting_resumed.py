"""Runs that rewrite prompts and completions give the same dataset wherever they are interrupted."""

from __future__ import annotations

import os
import shutil

import pytest


def teacher(prompt, seed, model):
    if "Identify" in prompt and "Rewrite the answer" not in prompt:
        return f"weak point {seed % 997}"
    if "Rewrite the answer" in prompt:
        return f"better words of {model} numbered {seed % 997} for the answer"
    if "#Given Prompt#:" in prompt:
        parent = prompt.split("#Given Prompt#:\n")[1].split("\n\n#")[0]
        return parent if seed % 4 == 0 else f"{parent} and then what about town {seed % 997}"
    return f"draft of {model} numbered {seed % 997} to {prompt}"


OTHERS = [pytest.param(changes, marks=pytest.mark.slow) for changes in ({"pairs": True}, {"evolve_keep": "last"})]


@pytest.mark.parametrize("changes", [{}, *OTHERS], ids=["all", "pairs", "last"])
def test_wherever_it_is_interrupted_the_dataset_is_the_same(bench, monkeypatch, changes):
    """Dies before and after each renaming, which is every moment at which the disk changes for a restart."""
    bench.prompts([{"prompt": f"river {i}", "answer": "x"} for i in range(5)])
    bench.teach(teacher)
    settings = {"evolve": 2, "revise": "default", "revise_rounds": 2, "keep_drafts": True, "near_duplicates": 0}
    settings |= {"teacher_models": {"a": "x", "b": "y"}, "max_repetition": 1.0, **changes}
    complete, rows = bench.run(**settings), bench.rows()
    assert len(rows) > 8
    names = {name: getattr(os, name) for name in ("replace", "rename")}
    left = 0

    def dies(name, after):
        def call(*paths):
            nonlocal left
            left -= 1
            if left < 0 and not after:
                raise KeyboardInterrupt
            names[name](*paths)
            if left < 0:
                raise KeyboardInterrupt

        return call

    for after in (False, True):
        moment, survived = 0, False
        while not survived:
            bench.out = bench.folder / f"out{moment}{after}"
            left = moment
            for name in names:
                monkeypatch.setattr(os, name, dies(name, after))
            try:
                bench.run(**settings)
                survived = True
            except KeyboardInterrupt:
                pass
            for name, function in names.items():
                monkeypatch.setattr(os, name, function)
            assert bench.run(**settings) == complete, moment
            assert bench.rows() == rows, moment
            shutil.rmtree(bench.out)
            shutil.rmtree(f"{bench.out}.work")
            moment += 1
        assert moment > 12
