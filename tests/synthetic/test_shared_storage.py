"""A work folder's copy in storage of other machines: whoever goes on, on whatever machine, makes the same dataset."""

from __future__ import annotations

import shutil
import uuid

import fsspec
import pytest
from chat_server import ChatServer, wait_until

from trl_distill import TeacherUnavailable
from trl_distill.synthetic.make_chunks import ChunkMaker, work_folder
from trl_distill.synthetic.shared_storage import SharedStorage
from trl_distill.synthetic.sources.load import load_source
from trl_distill.synthetic.work_folder import WorkFolder


CHATS = [{"prompt": [{"role": "user", "content": f"word {i}"}]} for i in range(14)]


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    where = f"memory://{uuid.uuid4().hex}/run" if request.param == "memory" else f"file://{tmp_path}/storage/run"
    yield where
    files, root = fsspec.core.url_to_fs(where)
    if files.exists(root):
        files.rm(root, recursive=True)


def test_a_machine_goes_on_where_another_ended(bench, url):
    bench.prompts(CHATS)
    with ChatServer(lambda text, seed: f"{text} at {seed}") as server:
        settings = {"teacher_model_name_or_path": f"{server.url}#m", "retries": 0}
        bench.run(**settings)
        expected, skipped = bench.rows(), bench.skipped()
        bench.out = bench.folder / "first"

        def refuse_once_a_chunk_is_shared(text):
            if text == "word 9":
                wait_until(lambda: files.exists(f"{root}/completions/0/000000.jsonl"))
                return 503
            return None

        files, root = fsspec.core.url_to_fs(url)
        server.refuse = refuse_once_a_chunk_is_shared
        with pytest.raises(TeacherUnavailable):
            bench.run(**settings, work_dir=url)
        server.refuse = lambda text: None
        bench.out = bench.folder / "second"  # which has nothing on its disk
        server.asked.clear()
        bench.run(**settings, work_dir=url)
        asked = {body["messages"][-1]["content"] for body in server.asked}
    assert (bench.rows(), bench.skipped()) == (expected, skipped)
    assert "word 9" in asked
    assert not asked & {f"word {i}" for i in range(4)}


def test_workers_on_other_machines_make_their_chunks(bench, url):
    bench.prompts(CHATS)
    with ChatServer(lambda text, seed: f"{text} at {seed}") as server:
        settings = {"teacher_model_name_or_path": f"{server.url}#m", "work_dir": url}
        bench.run(**settings)
        expected = bench.rows()
        SharedStorage(url, bench.folder / "out.work").discard("completions")
        for rank in range(2):
            bench.out = bench.folder / f"machine{rank}"
            config = bench.config(**settings)
            maker = ChunkMaker(config, work_folder(config), None, load_source)
            assert maker.stages[0].finished() == set(range(0, 4, 2) if rank else ())
            maker.make(range(rank, len(maker.prompts), 2))
        server.asked.clear()
        shutil.rmtree(bench.folder / "out.work")
        shutil.rmtree(bench.folder / "out")
        bench.out = bench.folder / "out"
        bench.run(**settings)
        assert not server.asked
    assert bench.rows() == expected


def test_a_folder_that_is_not_whole_is_not_taken(tmp_path, url):
    storage = SharedStorage(url, tmp_path / "one")
    (tmp_path / "one" / "prompts").mkdir(parents=True)
    (tmp_path / "one" / "prompts" / "000000.jsonl").write_text("{}")
    storage.push(tmp_path / "one" / "prompts")
    other = SharedStorage(url, tmp_path / "two")
    other.pull()
    assert not (tmp_path / "two" / "prompts").exists()
    (tmp_path / "one" / "prompts" / "counts.json").write_text("{}")
    storage.push(tmp_path / "one" / "prompts")
    other.pull()
    assert {path.name for path in (tmp_path / "two" / "prompts").iterdir()} == {"000000.jsonl", "counts.json"}


def test_what_a_killed_run_had_not_shared_is_shared_later(bench, url):
    bench.prompts(CHATS)
    settings = {"work_dir": url}
    loaded = bench.teach(lambda prompt, seed, model: f"answer {seed}")
    bench.run(**settings)
    expected, storage = bench.rows(), SharedStorage(url, bench.folder / "out.work")
    before = storage._names()
    for name in ("prompts", "settings.json", "completions"):
        storage.discard(name)  # as if it was killed before
    bench.out.rename(bench.folder / "before")
    bench.run(**settings)
    assert storage._names() == before
    shutil.rmtree(bench.folder / "out.work")
    bench.out.rename(bench.folder / "again")
    loaded.clear()
    bench.run(**settings)  # on a machine that has nothing
    assert (bench.rows(), loaded) == (expected, [])


def test_prompts_of_another_run_are_not_taken_for_those_of_the_storage(bench, url):
    """What a machine still has of a run that started over is replaced; answers of another run are kept, and said."""
    bench.prompts(CHATS)
    bench.teach(lambda prompt, seed, model: f"answer {seed}")
    bench.run(work_dir=url)
    other = WorkFolder(bench.folder / "machine", storage=url)
    (other.path / "completions" / "0" / "000000.jsonl").unlink()
    prompts = (other.path / "prompts" / "000000.jsonl").read_text()
    (other.path / "prompts" / "000000.jsonl").write_text("old")
    (other.path / "settings.json").write_text('{"seed": 7}')
    with pytest.raises(ValueError, match="holds answers of a run with other settings"):
        WorkFolder(bench.folder / "machine", storage=url)
    shutil.rmtree(other.path / "completions")
    WorkFolder(bench.folder / "machine", storage=url)
    assert (other.path / "prompts" / "000000.jsonl").read_text() == prompts


def test_a_file_system_that_nobody_knows(tmp_path):
    with pytest.raises(ValueError, match="`work_dir` cannot be used"):
        SharedStorage("nonsense://bucket/run", tmp_path)
