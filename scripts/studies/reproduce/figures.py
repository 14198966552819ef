"""The pictures of `scripts/reproduce.py`, and what is said in their place: one of each claim that has one.

Everything is computed from the records of its runs, the text for those who do not see the picture too. `report.py` has
the tables, and writes both into docs/results.md; `python -m scripts.studies.pictures` draws them again from there.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.studies.reproduce.records import Cost, RunRecord
from trl_distill.reporting.curves import new_figure, plain


Runs = Sequence[RunRecord]


ByArm = dict[str, list[RunRecord]]  # by label


Points = Sequence[tuple[float, float]]


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")  # Okabe and Ito's


MARKERS = "osD^vP*X"


WIDTHS = {"tiny": "16 wide, one layer", "small": "24 wide, two layers", "student": "48 wide, two layers"}


GREY, RANGE = "#555555", "mean and range"


@dataclass(frozen=True)
class Picture:
    """
    What a claim's picture shows.

    Attributes:
        title (`str`): above it; what is compared, not what comes out.
        draw (`Callable`): draws on an axis, and returns a remark for the line under the title.
        tell (`Callable`): what can be seen, as a sentence with numbers.
    """

    title: str
    draw: Callable[[Any, ByArm], str]
    tell: Callable[[ByArm], str]


def by_arm(runs: Runs) -> ByArm:
    found: ByArm = {}
    for one in runs:
        found.setdefault(one.arm, []).append(one)
    return found


def cost_of(run: RunRecord) -> Cost:
    """The cost, of a claim whose runs have one."""
    assert run.result.cost is not None
    return run.result.cost


def figure(claim: str, runs: Runs) -> Any:
    """A claim's picture; `None` where the table says it all."""
    picture = PICTURES.get(claim)
    if picture is None:
        return None
    made = new_figure(7.5, 5.2)
    axis = made.subplots()
    plain(axis)
    remark = picture.draw(axis, by_arm(runs))
    seeds = len({one.seed for one in runs})
    made.suptitle(picture.title, fontsize=12)
    axis.set_title(f"{seeds} seeds, {remark}", fontsize=9, color=GREY)
    handles, labels = axis.get_legend_handles_labels()
    columns = min(4, -(-len(labels) // 2)) if len(labels) > 3 else len(labels)
    made.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return made


def alt_text(claim: str, runs: Runs) -> str:
    """For those who do not see the picture: its title, and what can be read from it."""
    picture = PICTURES[claim]
    return f"{picture.title}. {picture.tell(by_arm(runs))}"


def _styles(arms: Mapping[str, Any]) -> Any:
    return zip(arms.items(), COLOURS, MARKERS, strict=False)


def _mean(runs: Runs, name: str) -> float:
    return statistics.mean(one.result.final[name] for one in runs)


def _listed(parts: Iterable[str]) -> str:
    """Arms have commas in their names."""
    return "; ".join(parts) + "."


def _lines(axis: Any, arms: ByArm, read: Callable[[RunRecord], Points]) -> None:
    """For each arm the mean over the seeds as a line, and the range between them."""
    for (arm, runs), colour, marker in _styles(arms):
        points = list(zip(*(read(one) for one in runs), strict=True))
        across = [statistics.mean(x for x, _ in point) for point in points]
        values = [[y for _, y in point] for point in points]
        low, high = ([end(v) for v in values] for end in (min, max))
        axis.fill_between(across, low, high, color=colour, alpha=0.15, linewidth=0)
        mean = [statistics.mean(v) for v in values]
        axis.plot(across, mean, color=colour, marker=marker, markersize=5, linewidth=1.8, label=arm, clip_on=False)


def _last(runs: Runs, read: Callable[[RunRecord], Points]) -> float:
    return statistics.mean(read(one)[-1][1] for one in runs)


def _dots(axis: Any, arms: ByArm, x: str, y: str) -> None:
    for (arm, runs), colour, marker in _styles(arms):
        xs, ys = ([one.result.final[name] for one in runs] for name in (x, y))
        axis.plot(
            xs, ys, color=colour, marker=marker, markersize=8, linestyle="none", alpha=0.8, label=arm, clip_on=False
        )


def _shares(axis: Any, label: str) -> None:
    """A vertical axis for shares: all of it, so that heights can be compared."""
    axis.set(ylabel=label, ylim=(0, 1))
    axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")


def _curve(run: RunRecord) -> Points:
    return [((made + trained) / 1000, right) for made, trained, right in cost_of(run).curve]


def _first(run: RunRecord) -> tuple[float, float]:
    return _curve(run)[0]


def _accuracy(axis: Any, arms: ByArm) -> None:
    _lines(axis, arms, _curve)
    axis.set(xlabel="thousand completion tokens, generated and trained", xlim=(0, None))
    _shares(axis, "accuracy on 200 problems")


def _ends(arms: ByArm) -> str:
    return _listed(f"{arm} {_last(runs, _curve):.0%}" for arm, runs in arms.items())


def _gap(axis: Any, arms: ByArm) -> str:
    _accuracy(axis, arms)
    starts = [[statistics.mean(values) for values in zip(*map(_first, runs), strict=True)] for runs in arms.values()]
    start, accuracy = max(starts)
    if start == 0:
        return RANGE
    axis.plot([0, start], [accuracy, accuracy], color=GREY, linestyle=":", linewidth=1.6, zorder=1)
    return f"{RANGE}; dotted: the teacher writes answers, and nothing is trained yet"


def _estimators(axis: Any, arms: ByArm) -> str:
    _accuracy(axis, arms)
    ends = {arm: statistics.mean(_curve(one)[-1][0] for one in runs) for arm, runs in arms.items()}
    early = any(end < 0.6 * max(ends.values()) for end in ends.values())
    return f"{RANGE}; as many steps each, so a line ends early where answers get short" if early else RANGE


def _mismatch(axis: Any, arms: ByArm) -> str:
    _lines(axis, arms, lambda run: run.result.own)
    axis.set(xlabel="tokens of its own at the end of the answer", xlim=(0, None))
    _shares(axis, "accuracy")
    return RANGE


def _mismatch_in_words(arms: ByArm) -> str:
    first, last = (next(iter(arms.values()))[0].result.own[place][0] for place in (0, -1))
    means = {
        arm: [statistics.mean(one.result.own[i][1] for one in runs) for i in (0, -1)] for arm, runs in arms.items()
    }
    return f"With {first} and {last} tokens of its own: " + _listed(
        f"{arm} {a:.1%} and {b:.1%}" for arm, (a, b) in means.items()
    )


def _diversity(axis: Any, arms: ByArm) -> str:
    _dots(axis, arms, "different of right", "avg@16")
    axis.set(xlabel="different ones among right answers", xlim=(0, 1.03))
    axis.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    _shares(axis, "right answers among 16 (avg@16)")
    return "a mark for each"


def _rewards(axis: Any, arms: ByArm) -> str:
    _dots(axis, arms, "kl", "avg@4")
    axis.set(xlabel="KL(student ‖ teacher), nats per token", xlim=(0, None))
    _shares(axis, "accuracy")
    return "a mark for each"


def _small(axis: Any, arms: ByArm) -> str:
    kinds = _kinds(arms)
    for (kind, sizes), colour, marker in _styles(kinds):
        values = [[1 - one.result.final["avg@16"] for one in runs] for runs in sizes.values()]
        low, high = ([end(v) for v in values] for end in (min, max))
        axis.fill_between(range(len(sizes)), low, high, color=colour, alpha=0.15, linewidth=0)
        mean = [statistics.mean(v) for v in values]
        axis.plot(range(len(sizes)), mean, color=colour, marker=marker, linewidth=1.8, label=kind, clip_on=False)
    sizes = list(next(iter(kinds.values())))
    axis.set_xticks(range(len(sizes)), [WIDTHS.get(size, size) for size in sizes])
    axis.set(xlabel="student")
    _shares(axis, "wrong answers")
    return RANGE


def _kinds(arms: ByArm) -> dict[str, ByArm]:
    """By divergence, then by the student's size."""
    kinds: dict[str, ByArm] = {}
    for arm, runs in arms.items():
        size, kind = arm.split(", ")
        kinds.setdefault(kind, {})[size] = runs
    return kinds


def _small_in_words(arms: ByArm) -> str:
    parts = []
    for kind, sizes in _kinds(arms).items():
        wrong = (f"{1 - _mean(runs, 'avg@16'):.1%} (student {WIDTHS.get(size, size)})" for size, runs in sizes.items())
        parts.append(f"{kind}: " + ", ".join(wrong))
    return _listed(parts)


def _rounds(run: RunRecord) -> Points:
    return [(i, one["different right"]) for i, one in enumerate(run.result.rounds)]


def _collapse(axis: Any, arms: ByArm) -> str:
    _lines(axis, arms, _rounds)
    axis.set(xlabel="round of training on its own answers", ylabel="different right answers among 16", ylim=(0, 16))
    for line, (arm, runs) in zip(axis.get_lines(), arms.items(), strict=True):
        start = statistics.mean(_rounds(one)[0][1] for one in runs)
        line.set_label(f"{arm}: {start:.1f} to {_last(runs, _rounds):.1f}")
    return RANGE


def _collapse_in_words(arms: ByArm) -> str:
    count = len(next(iter(arms.values()))[0].result.rounds) - 1
    start = statistics.mean(_rounds(one)[0][1] for one in next(iter(arms.values())))
    ends = _listed(f"{arm} {_last(runs, _rounds):.1f}" for arm, runs in arms.items())
    return f"All begin at {start:.1f} different right answers of 16. After {count} rounds: {ends}"


def _pairs(x: str, y: str, form: str) -> Callable[[ByArm], str]:
    """Both coordinates of each arm, in words."""
    return lambda arms: _listed(form.format(arm, _mean(runs, y), _mean(runs, x)) for arm, runs in arms.items())


PICTURES = {
    "gap": Picture(
        "Accuracy for the same number of generated and trained tokens",
        _gap,
        lambda arms: f"Final accuracy: {_ends(arms)} Where the teacher writes the answers, curves begin after that.",
    ),
    "mismatch": Picture("Accuracy by how much of the answer is the student's own", _mismatch, _mismatch_in_words),
    "diversity": Picture(
        "Right answers, and how many of them differ, by divergence",
        _diversity,
        _pairs("different of right", "avg@16", "{0} {1:.1%} right, {2:.0%} of these different"),
    ),
    "small student": Picture("Wrong answers by size of the student and divergence", _small, _small_in_words),
    "rewards": Picture(
        "Accuracy and KL to the teacher: reward, teacher, both",
        _rewards,
        _pairs("kl", "avg@4", "{0} {1:.1%} at {2:.3f} nats"),
    ),
    "estimators": Picture(
        "Accuracy by estimator, horizon γ and learning rate", _estimators, lambda arms: f"Final accuracy: {_ends(arms)}"
    ),
    "collapse": Picture("Variety of a model trained on its own answers", _collapse, _collapse_in_words),
}
