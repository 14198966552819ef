"""What is made of a sweep's results: means, the Pareto front, tables and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


pytest.importorskip("matplotlib")


def test_means_skip_what_is_no_number():
    from trl_distill.sweeps.results import last_means

    log = [{"step": 1, "a": 1.0, "b": None}, {"step": 2, "a": float("nan"), "b": 2}, {"step": 3, "a": 3.0, "c": "x"}]
    assert last_means(log, 2) == {"a": 2.0, "b": 2.0}
    assert last_means(log, 1) == {"a": 3.0, "b": 2.0}
    assert last_means([{"a": float("inf")}, {"a": 1.0}, {"a": float("-inf"), "b": float("inf")}], 3) == {"a": 1.0}


def test_files_of_a_sweep_are_json_that_every_reader_takes(tmp_path):
    from trl_distill.sweeps.results import write

    with pytest.raises(ValueError, match="not JSON compliant"):
        write(tmp_path / "result.json", {"metrics": {"a": float("nan")}})
    assert not (tmp_path / "result.json").exists()


def test_the_front_is_what_no_other_run_beats():
    from hypothesis import given
    from hypothesis import strategies as st

    from trl_distill.sweeps.figures import Point, pareto_front

    numbers = st.integers(0, 5).map(float)

    @given(st.lists(st.builds(Point, st.just(""), numbers, numbers), max_size=12))
    def check(points):
        front = pareto_front(points)
        for point in points:
            beaten = any(
                other.x <= point.x and other.y >= point.y and (other.x, other.y) != (point.x, point.y)
                for other in points
            )
            assert (point in front) != beaten

    check()


CROWDED = {
    "in a row": [(0.5, 0.21), (0.48, 0.215), (0.52, 0.207), (0.53, 0.2), (0.59, 0.217), (1.8, 0.86), (6.9, 0.98)],
    "as in the docs": [(6.9, 0.98), (8.2, 0.97), (0.55, 0.214), (0.49, 0.2), (0.53, 0.207), (0.52, 0.203), (0.66, 0.2)],
    "in one corner": [(1 + i / 50, 0.5 + i / 200) for i in range(6)] + [(9, 1.0)],
}


@pytest.mark.parametrize("name", CROWDED)
def test_labels_cover_neither_points_nor_each_other_nor_the_front(name):
    from trl_distill.sweeps.figures import Point, pareto_figure
    from trl_distill.sweeps.labels import along

    near = CROWDED[name]
    figure = pareto_figure([Point(f"beta={i}", x, y) for i, (x, y) in enumerate(near)], "KL", "reward")
    figure.draw_without_rendering()
    (axis,) = figure.axes
    texts = [text for text in axis.texts if text.get_text()]
    assert {text.get_text() for text in texts} == {f"beta={i}" for i in range(len(near))}
    boxes = [text.get_window_extent() for text in texts]
    front = [spot for line in axis.lines for spot in along(axis, line)]
    assert front
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])
        assert not any(box.contains(*axis.transData.transform(point)) for point in near)
        assert not any(box.contains(*spot) for spot in front)
        inside = axis.get_window_extent()
        assert inside.x0 <= box.x0 <= box.x1 <= inside.x1


def test_a_label_among_several_points_is_joined_to_its_own():
    from trl_distill.sweeps.figures import Point, pareto_figure

    near = CROWDED["as in the docs"]
    (axis,) = pareto_figure([Point(f"{i}", x, y) for i, (x, y) in enumerate(near)], "KL", "reward").axes
    joined = {text.xy for text in axis.texts if not text.get_text()}
    assert {near[2], near[4]} <= joined


def test_a_reward_that_is_never_negative_is_drawn_from_zero():
    from trl_distill.sweeps.figures import Point, pareto_figure

    for lowest, bottom in ((0.5, 0.0), (-0.5, None)):
        points = [Point("a", 1.0, lowest), Point("b", 2.0, 0.9)]
        (axis,) = pareto_figure(points, "KL", "reward").axes
        assert (axis.get_ylim()[0] == bottom) if bottom is not None else (axis.get_ylim()[0] < lowest)


def sweep_of(tmp_path: Path, metric: str, goal: str, runs: list[tuple[dict, dict]]) -> Path:
    from trl_distill.sweeps.results import RESULT, SWEEP

    state = {"sweep": {"name": "toy", "metric": {"name": metric, "goal": goal}}, "last": 5}
    (tmp_path / SWEEP).write_text(json.dumps(state))
    for index, (settings, metrics) in enumerate(runs):
        (tmp_path / f"{index:03d}").mkdir()
        (tmp_path / f"{index:03d}" / RESULT).write_text(json.dumps({"settings": settings, "metrics": metrics}))
    return tmp_path


@pytest.mark.parametrize(
    ("metric", "runs", "picture", "texts"),
    [
        (
            "train/reward",
            [({"beta": b}, {"reward": 1 - b, "distill/reverse_kl": 1 / b}) for b in (0.1, 0.5, 1.0)],
            "pareto.png",
            {"beta=0.1", "beta=0.5", "beta=1", "reward", "distill/reverse_kl, nats per token"},
        ),
        (
            "train/distill/reverse_kl",
            [({"learning_rate": lr}, {"distill/reverse_kl": lr}) for lr in (1e-5, 1e-4, 1e-3)],
            "metric.png",
            {"learning_rate", "distill/reverse_kl", "best: learning_rate=0.001"},
        ),
        (
            "train/reward",
            [({"divergence": d, "kl_estimator": "full"}, {"reward": 0.5}) for d in ("jsd", "mixed")],
            "metric.png",
            {"jsd, full", "mixed, full", "reward", "0.5"},
        ),
    ],
)
def test_each_kind_of_sweep_has_its_picture(tmp_path, monkeypatch, metric, runs, picture, texts):
    import matplotlib.figure
    from matplotlib.text import Text
    from rich.console import Console

    from trl_distill.sweeps.report import report

    drawn: list[str] = []
    save = matplotlib.figure.Figure.savefig

    def saving(figure, *arguments, **options):
        save(figure, *arguments, **options)
        drawn.extend(text.get_text() for text in figure.findobj(Text))

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", saving)
    report(sweep_of(tmp_path, metric, "maximize", runs), Console())
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert texts <= set(drawn)
    assert {"metric.png", "pareto.png"} - {picture} == {"metric.png", "pareto.png"} - {
        path.name for path in tmp_path.glob("*.png")
    }


def test_a_metric_that_no_run_logged_is_said(tmp_path, capsys):
    from rich.console import Console

    from trl_distill.sweeps.report import report

    report(sweep_of(tmp_path, "train/reward", "maximize", [({"x": 1}, {"loss": 1.0})]), Console())
    assert "no run has logged train/reward" in " ".join(capsys.readouterr().out.split())


def test_runs_that_were_ended_early_are_told_apart_and_left_out_of_the_picture(tmp_path):
    from rich.console import Console

    from trl_distill.sweeps.report import report
    from trl_distill.sweeps.results import RESULT

    runs = [({"beta": b}, {"reward": 1 - b, "distill/reverse_kl": 1 / b}) for b in (0.1, 0.5, 1.0)]
    folder = sweep_of(tmp_path, "train/reward", "maximize", runs)
    ended = json.loads((folder / "000" / RESULT).read_text()) | {"stopped": "after 4 values"}
    (folder / "000" / RESULT).write_text(json.dumps(ended))  # it would be on the front, with the highest reward
    rows = report(folder, Console())
    assert [row.stopped for row in rows] == ["after 4 values", "", ""]
    lines = (folder / "table.md").read_text().splitlines()[2:]
    assert [line.split("|")[-2].strip() for line in lines] == ["ended early", "Pareto front", "Pareto front"]
    assert "after 4 values" in (folder / "results.csv").read_text()


def test_runs_are_listed_by_number_beyond_a_thousand(tmp_path):
    from trl_distill.sweeps.results import RESULT, collect

    for name in ("1000", "998", "999"):
        (tmp_path / name).mkdir()
        (tmp_path / name / RESULT).write_text(json.dumps({"settings": {}, "metrics": {}}))
    assert [row.run for row in collect(tmp_path)] == ["998", "999", "1000"]
