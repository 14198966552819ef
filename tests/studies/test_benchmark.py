"""`scripts/benchmark.py` in miniature: what is compared is the same work, or is not compared."""

from __future__ import annotations

import gc
import json
import math
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import succeeds


SCRIPTS = Path(__file__).parents[2] / "scripts"
CPU = torch.device("cpu")


@pytest.fixture
def cells():
    from scripts.studies.benchmark import cells as benchmark_cells

    return benchmark_cells


@pytest.fixture
def benchmark():
    from scripts.studies.benchmark import run as benchmark

    return benchmark


@pytest.fixture
def measured(benchmark, cells):
    """Measures a preset's cell in miniature; memory is left out, since it starts processes."""
    from scripts.studies.benchmark.results import Machine, Results

    def call(name: str, repeats: int = 1, **changes) -> Results:
        cell = next(cell for cell in cells.preset("cpu", dry_run=True) if cell.name == name)
        how = benchmark.Measuring(repeats, threads=1, device=CPU)
        found = benchmark.measure(replace(cell, **changes), how, lambda: None)
        return Results("cpu", True, Machine("p", "d", 1), {}, "c", [found])

    return call


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ragged", {}),
        pytest.param("ragged, estimators", {}, marks=pytest.mark.slow),
        pytest.param("ragged, LoRA", {}, marks=pytest.mark.slow),
        ("ragged, combined", {}),
    ],
)
def test_every_loss_is_what_its_objective_has_on_the_rollouts(measured, name, changes):
    from scripts.studies.benchmark import report as report

    results = measured(name, repeats=2, **changes)
    (cell,) = results.cells
    assert report.disagreeing(results) == []
    for found in cell.contenders.values():
        assert len(found.update_s) == 2
        assert len(found.shares) == 5
        assert all(seconds > 0 for seconds in found.shares.values())
    for _, _, ours, theirs in results.pairs():
        value = report.ratio(ours, theirs, "float32", "update_s")
        assert value.least <= value.median <= value.most
    if name == "ragged":
        losses = [cell.contenders[one].loss for one in ("ours", "distillation", "gkd")]
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_no_ratio_where_a_loss_is_another(measured, monkeypatch):
    from trl import DistillationTrainer

    from scripts.studies.benchmark import report as report

    honest = DistillationTrainer.compute_loss
    monkeypatch.setattr(DistillationTrainer, "compute_loss", lambda *a, **k: honest(*a, **k) * 1.0001)
    results = measured("uniform")
    rows = {row[2]: row for row in report.speed(results)[2]}
    assert report.REFUSED in rows["`DistillationTrainer`"]
    assert report.REFUSED not in rows["`GKDTrainer`"]
    assert report.REFUSED in report.markdown(results)
    (line,) = report.disagreeing(results)
    assert "`DistillationTrainer`" in line


def test_no_ratio_at_all_where_ours_is_wrong(measured, monkeypatch):
    from scripts.studies.benchmark import report as report
    from trl_distill import OPDTrainer

    honest = OPDTrainer.compute_loss
    monkeypatch.setattr(OPDTrainer, "compute_loss", lambda *a, **k: honest(*a, **k) * 1.0001)
    results = measured("uniform", contenders=("ours", "distillation"), generates=True)
    assert all(row[5] == report.REFUSED for row in report.speed(results)[2])


def test_generation_counts_for_the_step_alone(measured):
    results = measured("uniform", contenders=("ours", "gkd"), generates=True, tokens=12)
    for found in results.cells[0].contenders.values():
        assert found.generation_s > 0
        assert found.step_s[0] > found.generation_s


@pytest.mark.parametrize("name", ["ours", "ours, combined"])
def test_a_whole_step_is_taken_apart(cells, tmp_path, name):
    """Every part takes some time, generation the more the longer it is; afterwards the trainer is as it was."""
    from scripts.studies.benchmark.clocks import AROUND, PARTS
    from scripts.studies.benchmark.contenders import Contender, TrainerParts

    cell = replace(cells.preset("real", dry_run=True)[0], group=4 if "combined" in name else 1, tokens=12)
    contender = Contender(name, TrainerParts(cell, cells.make_rollouts(cell), tmp_path, CPU))
    trainer, student = contender.trainer, contender.student
    before, generate = set(vars(trainer)), student.generate
    contender.turn(0)
    attributes = {*before, *vars(trainer)}
    found = contender.whole(1)
    assert set(found) == {*PARTS, *AROUND}
    assert all(seconds > 0 for seconds in found.values())
    found = min(
        (found, *(contender.whole(1) for _ in range(2))), key=sum_of
    )  # the turn that other programs disturbed least
    assert found["generation"] > 0.2 * sum_of(found)  # twelve forward passes for each prompt, against one
    assert set(vars(trainer)) <= attributes
    assert student.generate == generate
    assert trainer.args.logging_strategy == "no"
    longer = replace(cell, tokens=96)
    contender = Contender(name, TrainerParts(longer, cells.make_rollouts(longer), tmp_path / "longer", CPU))
    contender.turn(0)
    assert contender.whole(1)["generation"] > 1.5 * found["generation"]


def sum_of(parts: dict[str, float]) -> float:
    return sum(parts.values())


def test_the_largest_part_of_a_step_is_marked(measured):
    from scripts.studies.benchmark import report as report

    results = measured("uniform", contenders=("ours",), generates=True)
    results.cells[0].contenders["ours"].whole["teacher"] = 1e6
    _, columns, (row,) = report.whole(results)
    assert row[columns.index("teacher")] == "**100.0%**"
    assert sum("**" in text for text in row) == 1


def test_without_metrics_the_loss_is_the_same_and_the_profile_is_not_logged(cells, tmp_path):
    from scripts.studies.benchmark.contenders import Contender, TrainerParts

    cell = cells.preset("cpu", dry_run=True)[0]
    logged, losses = [], []
    for i, name in enumerate(("ours", "ours, without metrics")):
        contender = Contender(name, TrainerParts(cell, cells.make_rollouts(cell), tmp_path / str(i), CPU))
        names: set[str] = set()
        record = contender.trainer.record
        contender.trainer.record = lambda name, *value, names=names, record=record: (
            names.add(name) or record(name, *value)
        )
        losses.append(contender.turn(0).loss)
        logged.append(names)
    assert losses[0] == losses[1]
    profile = logged[0] - logged[1]
    assert logged[1] < logged[0]
    assert {"distill/concentration", "distill/top1_agreement", "distill/reverse_kl/quarter1"} <= profile
    assert "distill/reverse_kl" in logged[1]


def test_an_optimizer_that_is_forgotten_is_gone_and_made_anew(cells, tmp_path):
    from scripts.studies.benchmark.contenders import Contender, TrainerParts

    cell = cells.preset("cpu", dry_run=True)[0]
    contender = Contender("ours", TrainerParts(cell, cells.make_rollouts(cell), tmp_path, CPU))
    before = contender.turn(0).loss
    inner = weakref.ref(contender.trainer.optimizer.optimizer)
    contender.forget_optimizer()
    gc.collect()
    assert inner() is None
    assert contender.turn(0).loss == before


def test_ragged_lengths_reach_ten_medians(cells):
    cell = replace(cells.cpu_cells()[0], ragged=True, tokens=100, rows=64)
    lengths = sorted(cell.lengths())
    median = (lengths[31] + lengths[32]) / 2
    assert median == pytest.approx(100, rel=0.02)
    assert lengths[-1] == 10 * 100
    rollouts = cells.make_rollouts(cell, seed=3)
    assert sorted(map(len, rollouts.completions)) == lengths
    assert all(ids[-1] == cells.EOS and cells.EOS not in ids[:-1] for ids in rollouts.completions)


def test_prompts_as_text_are_the_same_ids(cells):
    rollouts = cells.make_rollouts(replace(cells.cpu_cells()[0], vocab=500))
    tokenizer = cells.make_tokenizer(500)
    for prompt in rollouts.prompts:
        assert tokenizer(" ".join(f"w{i}" for i in prompt))["input_ids"] == prompt


@pytest.mark.parametrize("lora", [False, True])
def test_the_floor_counts_what_a_step_must_multiply(cells, lora):
    from scripts.studies.benchmark.reference import products

    cell = replace(cells.cpu_cells()[0], rows=4, micro_batch=2, tokens=24, prompt=8, lora=lora)
    rollouts = cells.make_rollouts(cell)
    counted = sum(p.count * p.batch * p.m * p.k * p.n for p in products(cell, rollouts))
    tokens, judged = 4 * 32, 4 * 24
    sizes = {size: sum(map(math.prod, cells.projections(size))) for size in (cell.student, cell.teacher)}
    expected = tokens * ((2 if lora else 3) * sizes[cell.student] + sizes[cell.teacher])
    expected += judged * cell.vocab * ((2 if lora else 3) * cell.student.hidden + cell.teacher.hidden)
    for size, passes in ((cell.student, 3), (cell.teacher, 1)):
        expected += passes * 4 * size.layers * size.heads * 32 * 32 * size.head_dim  # half of two products
    assert counted == expected


def test_peak_memory_sees_what_was_there_for_a_moment():
    from scripts.studies.benchmark.clocks import peak_memory

    kept: list[torch.Tensor] = [torch.ones(2**24)]  # there before: does not count
    peak = peak_memory(CPU, lambda: torch.ones(2**25).sum().item())  # 128 MiB, let go at once
    assert 120 < peak < 150
    assert peak_memory(CPU, lambda: kept[0].sum().item()) < 20


def test_the_saved_file_holds_every_number(measured, tmp_path):
    results = measured("uniform", repeats=2, contenders=("ours", "gkd"), generates=True)
    results.save(tmp_path)
    whole = json.loads((tmp_path / "benchmark.json").read_text())
    (cell,) = whole["cells"]
    assert (whole["preset"], whole["dry_run"], whole["machine"]["threads"]) == ("cpu", True, 1)
    assert (cell["name"], cell["contenders"].keys()) == ("uniform", {"ours", "gkd"})
    assert len(cell["lengths"]) == cell["rows"]
    assert cell["tokens_in_all"] == cell["completion_tokens"] + cell["rows"] * cell["prompt"]
    assert len(cell["floor_s"]) == 2
    for name, found in cell["contenders"].items():
        assert found["update_s"] == results.cells[0].contenders[name].update_s
        assert found.keys() >= {"label", "ours", "objective", "expected", "scale", "loss", "step_s", "shares"}
        assert found.keys().isdisjoint({"failed", "peak_mib"})  # not measured


def test_a_saved_file_gives_the_tables_again(measured, tmp_path):
    from scripts.studies.benchmark import report as report
    from scripts.studies.benchmark.results import Results

    results = measured("ragged")
    results.save(tmp_path)
    again = Results.load(tmp_path / "benchmark.json")
    assert report.markdown(again) == report.markdown(results)
    again.save(tmp_path / "again")
    assert (tmp_path / "again" / "benchmark.json").read_text() == (tmp_path / "benchmark.json").read_text()


def test_docs_are_written_between_the_markers_of_their_preset(measured, tmp_path):
    from scripts.studies.benchmark import report as report

    results = measured("uniform", contenders=("ours",))
    page = tmp_path / "page.md"
    begin, end = "<!-- benchmark cpu: begin -->", "<!-- benchmark cpu: end -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    report.write_docs(results, page)
    text = page.read_text()
    assert text.startswith(f"before\n{begin}")
    assert text.endswith(f"{end}\nafter\n")
    assert "old" not in text
    assert "rehearsal" in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="Put them there"):
        report.write_docs(results, page)
    assert page.read_text() == "no markers"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cells", "oval"], "There are no cells"),
        (["--repeats", "0"], "no median"),
        (["--processor_time", "--threads", "2"], "Add `--threads 1`"),
        pytest.param(
            ["--preset", "gpu"],
            "needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run"),
        ),
    ],
)
def test_bad_arguments(benchmark, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        benchmark.main(benchmark.parse([*arguments, "--output_dir", str(tmp_path)]))


def test_the_pages_tables_are_those_of_the_files():
    from scripts.studies.benchmark import report as report
    from scripts.studies.benchmark.results import Results

    docs = SCRIPTS.parent / "docs"
    page = (docs / "benchmarks.md").read_text()
    for path in sorted((docs / "results" / "benchmark").glob("*.json")):
        results = Results.load(path)
        begin, end = (f"<!-- benchmark {results.preset}: {side} -->" for side in ("begin", "end"))
        assert page.partition(begin)[2].partition(end)[0].strip() == report.markdown(results).strip(), path.name
        assert report.disagreeing(results) == []
        assert not results.dry_run


@pytest.fixture(scope="module")
def grown():
    """Two points of an axis each, in miniature."""
    from scripts.studies.benchmark import run as benchmark
    from scripts.studies.benchmark.cells import preset
    from scripts.studies.benchmark.results import Machine, Results

    some = [cell for cell in preset("growth", dry_run=True) if cell.name in ("teachers 1", "teachers 4", "group 4")]
    some += [replace(cell, tokens=n, at=n) for cell in preset("growth", True)[:1] for n in (16, 256)]
    how = benchmark.Measuring(1, threads=1, device=CPU)
    return Results("growth", True, Machine("p", "d", 1), {}, "c", [benchmark.measure(c, how, int) for c in some])


def test_growth_has_the_loss_of_one_teacher_and_of_several(grown):
    from scripts.studies.benchmark import report as report

    assert report.disagreeing(grown) == []
    assert [len(found.contenders) for found in grown.cells] == [1] * 5


def test_slopes_are_those_of_the_last_two_points(grown, tmp_path):
    from scripts.studies.benchmark import slopes

    curves = slopes.curves_of(grown)
    assert curves.keys() == {"length", "teachers"}  # one point has no slope
    curve = slopes.Curve([1, 10, 100], [5, 1, 10], [], [1, 2, 20])
    assert curve.slope(curve.seconds) == pytest.approx(1)
    assert curve.within
    assert not slopes.Curve([1, 10], [1, 100], [], [1, 10]).within
    assert not slopes.Curve([1, 10], [1, 10], [1, 100], [1, 10]).within
    _, columns, rows = slopes.sheet(grown)
    assert [row[0] for row in rows] == [slopes.LABELS["length"], slopes.LABELS["teachers"]]
    assert all(len(row) == len(columns) for row in rows)
    slopes.draw(grown, tmp_path / "slopes.png")
    assert (tmp_path / "slopes.png").stat().st_size > 0


def test_slopes_leave_curves_of_several_contenders_to_the_other_table(grown):
    from scripts.studies.benchmark import slopes

    beside = {"theirs": next(iter(grown.cells[0].contenders.values()))}
    two = [replace(found, contenders={**found.contenders, **beside}) for found in grown.cells]
    assert slopes.curves_of(replace(grown, cells=two)) == {}
    assert slopes.sheet(replace(grown, cells=two))[2] == []


@pytest.mark.parametrize(
    ("axis", "expected"), [("length", 1.83), ("teachers", 0.76), ("group", 1.0), ("vocabulary", 0.8)]
)
def test_products_grow_as_they_must(cells, axis, expected):
    """At full size: attention makes long rows grow faster than in proportion, the rest is at most that."""
    from scripts.studies.benchmark.reference import multiplications

    few, many = [cell for cell in cells.far_cells() if cell.axis == axis][-2:]
    found = math.log(multiplications(many) / multiplications(few)) / math.log(many.at / few.at)
    assert found == pytest.approx(expected, abs=0.05)


def test_what_another_would_type(benchmark):
    given = ["--preset", "real", "--beside", "A study.", "--output_dir", "/somewhere", "--no_memory"]
    assert benchmark.typed(given) == ["--preset", "real", "--no_memory"]


@pytest.mark.slow
def test_the_gpu_preset_rehearsed(cells, tmp_path):
    command = [sys.executable, SCRIPTS / "benchmark.py", "--preset", "gpu", "--dry_run", "--repeats", "1"]
    succeeds([*command, "--threads", "1", "--output_dir", tmp_path])
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert [cell["name"] for cell in results["cells"]] == [cell.name for cell in cells.preset("gpu", True)]
    for cell in results["cells"]:
        for found in cell["contenders"].values():
            assert "failed" not in found
            assert found["peak_mib"] > 0
    assert (tmp_path / "benchmark_growth.png").exists()
