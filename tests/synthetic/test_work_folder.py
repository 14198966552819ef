"""The work folder: nothing half-written has a final name, other settings and other runs are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import started

from trl_distill.synthetic.work_folder import WorkFolder, read_lines, seed_of, write_lines


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    def rows():
        yield {"a": 1}
        raise KeyboardInterrupt

    path = tmp_path / "x" / "000001.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write_lines(path, rows())
    assert not path.exists()
    write_lines(path, [{"a": "ä\n"}, {"a": None}])
    assert list(read_lines(path)) == [{"a": "ä\n"}, {"a": None}]


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), VALUES, max_size=3))
def test_rows_are_strict_json_and_read_back_as_they_were(row):
    path = Path(tempfile.gettempdir()) / f"rows-{os.getpid()}.jsonl"
    write_lines(path, [row])
    json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert repr(list(read_lines(path))) == repr([row])  # NaN differs from itself
    path.unlink()


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    work = WorkFolder(tmp_path)

    def fill(fail):
        with work.folder("made") as folder:
            (folder / "x").write_text("x")
            assert [path.name for path in folder.iterdir()] == ["x"]  # nothing of an earlier attempt
            if fail:
                (folder / "y").write_text("y")
                raise RuntimeError

    with pytest.raises(RuntimeError):
        fill(True)
    assert not (tmp_path / "made").exists()
    fill(False)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["x"]


def test_other_settings_are_named(tmp_path):
    work = WorkFolder(tmp_path)
    work.check_settings({"a": 1, "b": (1, 2), "c": None})
    work.check_settings({"a": 1, "b": [1, 2], "c": None})
    write_lines(work.chunk("completions", 0, 0), [])
    with pytest.raises(ValueError, match=r"`a` was 1, now 2; `c` was None, now 3\..*delete"):
        work.check_settings({"a": 2, "b": [1, 2], "c": 3})


def test_before_the_first_answer_other_settings_begin_anew(tmp_path):
    work = WorkFolder(tmp_path)
    work.check_settings({"a": 1})
    write_lines(work.chunk("prompts", 0), [])
    work.check_settings({"a": 1})
    assert work.chunk("prompts", 0).exists()
    work.check_settings({"a": 2})
    assert not (tmp_path / "prompts").exists()
    write_lines(work.chunk("completions", 0, 0), [])
    with pytest.raises(ValueError, match="`a` was 2, now 1"):
        work.check_settings({"a": 1})


def test_one_run_at_a_time_and_a_killed_one_does_not_count(tmp_path):
    work = WorkFolder(tmp_path)
    code = (
        "import sys, time; from pathlib import Path; from trl_distill.synthetic.work_folder import WorkFolder\n"
        "with WorkFolder(Path(sys.argv[1])).locked(): print('in', flush=True); time.sleep(60)"
    )
    with started([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(ValueError, match="Another run works"), work.locked():
            pass
    with work.locked():
        pass


def test_seeds_hang_on_all_parts():
    seeds = {seed_of(a, b) for a in range(10) for b in range(10)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(1, "x") == seed_of(1, "x")
