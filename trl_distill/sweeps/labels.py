"""Where the labels of a picture's points go: beside their points, on no other point, line or label.

A label that stands farther off, or among several points, is joined to its own by a thin line. Places are tried from
near to far and in several orders; the one that covers least is taken.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..foreign_text import in_figure


Spot = tuple[float, float]  # pixels on the page


NEAREST, FARTHEST, STEP = 29, 250, 17  # pixels between a point and the middle of its label


GAP = 6  # pixels around a label


CLEAR = 12  # pixels around a point that are kept clear of others' lines, where it is not nearer than that


# What it costs to cover a label, a point, a line; to cross a label or a point; to stand where it could be another's
LABEL, POINT, LINE, CROSSED_LABEL, CROSSED_POINT, DOUBTFUL = 1000, 100, 10, 30, 10, 20


@dataclass(frozen=True)
class Place:
    """The middle of a label, its box as left, bottom, right and top, and the line to its point, if there is one."""

    middle: Spot
    box: tuple[float, float, float, float]
    leader: tuple[Spot, ...] = ()

    def covers(self, spot: Spot) -> bool:
        left, bottom, right, top = self.box
        return left < spot[0] < right and bottom < spot[1] < top

    def overlaps(self, other: Place) -> bool:
        left, bottom, right, top = self.box
        return left < other.box[2] and other.box[0] < right and bottom < other.box[3] and other.box[1] < top


def write_labels(figure: Any, axis: Any, points: Sequence[tuple[str, float, float, str]]) -> None:
    """
    Write a label at each point of a drawn axis.

    Args:
        figure (`matplotlib.figure.Figure`): that the axis is part of.
        axis (`matplotlib.axes.Axes`): with everything else on it; its limits must not change afterwards.
        points (`Sequence`): label, x, y and colour of each.
    """
    figure.draw_without_rendering()  # settles where the points are on the page
    dots: list[Spot] = [tuple(map(float, axis.transData.transform((x, y)))) for _, x, y, _ in points]  # type: ignore[misc]
    texts = []
    for label, x, y, colour in points:
        style = {"ha": "center", "va": "center", "color": colour, "fontsize": 10, "textcoords": "offset points"}
        texts.append(axis.annotate(in_figure(label), (x, y), (0, 0), **style))
    extents = [text.get_window_extent() for text in texts]
    sizes = [(extent.width + 2 * GAP, extent.height + 2 * GAP) for extent in extents]
    whole = axis.get_window_extent()
    inside = (whole.x0, whole.y0, whole.x1, whole.y1)
    places = _arranged(dots, sizes, [spot for line in axis.lines for spot in along(axis, line)], inside)
    for (_, x, y, colour), text, dot, place in zip(points, texts, dots, places, strict=True):
        to_points = 72 / figure.dpi
        text.set_position([(m - d) * to_points for m, d in zip(place.middle, dot, strict=True)])
        free = [spot for spot in place.leader if not place.covers(spot)]
        if free:
            begin = [(edge - d) * to_points for edge, d in zip(free[-1], dot, strict=True)]
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 5}
            axis.annotate("", (x, y), begin, textcoords="offset points", arrowprops=line)


def _arranged(dots: list[Spot], sizes: list[Spot], lines: list[Spot], inside: tuple[float, ...]) -> list[Place]:
    """The best of several orders in which labels are placed, one after another."""
    given = range(len(dots))
    orders = [
        [*given],
        [*reversed(given)],
        sorted(given, key=lambda i: dots[i]),
        sorted(given, key=lambda i: dots[i][1]),
    ]
    best, least = {}, math.inf
    for order in orders if len(dots) <= 20 else orders[:1]:
        placed: dict[int, Place] = {}
        total = 0.0
        for i in order:
            drawn = lines + [spot for other in placed.values() for spot in other.leader]
            cost, place = _best(dots[i], sizes[i], dots, [*placed.values()], drawn, inside)
            placed[i], total = place, total + cost
        if total < least:
            best, least = placed, total
        if total == 0:
            break
    return [best[i] for i in given]


def _best(
    dot: Spot, size: Spot, dots: list[Spot], taken: list[Place], drawn: list[Spot], inside: tuple[float, ...]
) -> tuple[float, Place]:
    """The nearest place of those that cover least, and what it costs; above the point where there is no room."""
    found: tuple[float, Place] = (math.inf, _place(dot, size, (dot[0], dot[1] + NEAREST)))
    for distance, angle in itertools.product(range(NEAREST, FARTHEST, STEP), range(90, 450, 15)):
        turned = math.radians(angle)
        middle = (dot[0] + 1.7 * distance * math.cos(turned), dot[1] + distance * math.sin(turned))  # letters are wide
        for joined in (False, True) if distance == NEAREST else (True,):
            place = _place(dot, size, middle, joined)
            left, bottom, right, top = place.box
            if left < inside[0] or bottom < inside[1] or right > inside[2] or top > inside[3]:
                continue
            cost = _cost(place, dot, dots, taken, drawn, found[0])
            if cost < found[0]:
                found = (cost, place)
            if cost == 0:
                return found
    return found if math.isfinite(found[0]) else (LABEL, found[1])


def _place(dot: Spot, size: Spot, middle: Spot, joined: bool = False) -> Place:
    (x, y), (width, height) = middle, (size[0] / 2, size[1] / 2)
    return Place(middle, (x - width, y - height, x + width, y + height), between(dot, middle) if joined else ())


def _cost(
    place: Place, dot: Spot, dots: list[Spot], taken: list[Place], drawn: list[Spot], limit: float = math.inf
) -> float:
    """What a place covers, crosses, or could be mistaken for; from `limit` on only a part of it."""
    others = [other for other in dots if other != dot]
    cost = LABEL * sum(map(place.overlaps, taken)) + POINT * sum(map(place.covers, dots))
    if cost >= limit:
        return cost
    cost += LINE * any(map(place.covers, drawn))
    cost += CROSSED_LABEL * sum(any(map(other.covers, place.leader)) for other in taken)
    apart = [other for other in others if math.dist(dot, other) > CLEAR]
    cost += CROSSED_POINT * sum(any(math.dist(spot, other) < CLEAR / 2 for spot in place.leader) for other in apart)
    cost += sum(any(math.dist(spot, other) < CLEAR for spot in place.leader) for other in apart)
    nearest = min((math.dist(place.middle, other) for other in others), default=math.inf)
    return cost + DOUBTFUL * (not place.leader and nearest < 1.5 * math.dist(place.middle, dot))


def between(start: Spot, end: Spot) -> tuple[Spot, ...]:
    """Spots about four pixels apart, both ends included."""
    (x, y), count = start, max(1, round(math.dist(start, end) / 4))
    return tuple((x + (end[0] - x) * i / count, y + (end[1] - y) * i / count) for i in range(count + 1))


def along(axis: Any, line: Any) -> list[Spot]:
    """Spots along a line; one of steps runs across first, then up. Marks alone have none."""
    if line.get_linestyle() == "None":
        return []
    spots: list[Spot] = []
    for start, end in itertools.pairwise(tuple(axis.transData.transform(point)) for point in line.get_xydata()):
        corner = (end[0], start[1]) if line.get_drawstyle() == "steps-post" else start
        spots += [*between(start, corner), *between(corner, end)]
    return spots
