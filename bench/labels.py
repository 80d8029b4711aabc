"""Labels beside points and at the ends of lines, so that none lies on another."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

LINE = "#999999"
RADII = (9, 18, 28, 40, 54, 70, 88, 108, 130)  # points on paper
CLOSE = 14  # a label up to here needs no line


class Label(NamedTuple):
    text: str
    x: float
    y: float
    colour: str


class Group(NamedTuple):
    """Points that one label names."""

    text: str
    points: list[tuple[float, float]]
    colour: str


class Box(NamedTuple):
    x0: float
    y0: float
    x1: float
    y1: float

    def has(self, x: float, y: float, margin: float = 0.0) -> bool:
        return self.x0 - margin < x < self.x1 + margin and self.y0 - margin < y < self.y1 + margin

    def overlaps(self, other: Box) -> bool:
        return self.x0 < other.x1 and other.x0 < self.x1 and self.y0 < other.y1 and other.y0 < self.y1


def beside_points(ax: Any, groups: list[Group], clear: list[tuple[float, float]], size: float = 8.5) -> None:
    """Each group's label in the least crowded spot around one of its points, with a thin line where that is not close.

    clear: more data points that labels keep off. The figure must have been drawn once, for its places to be known.
    """
    renderer, scale = ax.figure.canvas.get_renderer(), ax.figure.dpi / 72
    boxes = [Box(*t.get_window_extent(renderer).extents) for t in ax.texts]
    frame = Box(*ax.get_window_extent(renderer).extents)
    if ax.get_legend():
        boxes.append(Box(*ax.get_legend().get_window_extent(renderer).extents))
    pixels = [tuple(ax.transData.transform(p)) for p in [*(p for g in groups for p in g.points), *clear]]
    lines: list[tuple[float, float]] = []
    for group in sorted(groups, key=lambda g: len(g.points)):  # those with the least choice first
        text = ax.annotate(group.text, group.points[0], fontsize=size)
        width, height = text.get_window_extent(renderer).size
        text.remove()
        best: tuple[float, tuple[float, float], float, float, Box, list] | None = None
        for point, radius, angle in itertools.product(group.points, RADII, range(0, 360, 15)):
            px, py = ax.transData.transform(point)
            dx, dy = radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))
            left, bottom = px + dx * scale - (width if dx < 0 else 0), py + dy * scale - height / 2
            box = Box(left, bottom, left + width, bottom + height)
            cost = radius / 25
            if best and cost >= best[0]:
                continue
            parts = range(2, 10) if radius > CLOSE else ()
            line = [(px + dx * scale * i / 10, py + dy * scale * i / 10) for i in parts]
            cost += 10 * sum(box.overlaps(other) for other in boxes)
            cost += 4 * sum(box.has(*dot, 4 * scale) for dot in pixels) + sum(box.has(*dot, 2) for dot in lines)
            cost += 20 * (box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1)
            cost += sum(other.has(*at) for other in boxes for at in line)
            cost += sum(math.dist(at, dot) < 4 * scale for dot in pixels for at in line[2:])
            if best is None or cost < best[0]:
                best = (cost, point, dx, dy, box, line)
        _, point, dx, dy, box, line = best  # type: ignore[misc]
        arrow = dict(arrowstyle="-", color=LINE, linewidth=0.6, shrinkA=0, shrinkB=2)
        ax.annotate(
            group.text, point, (dx, dy), textcoords="offset points", ha="left" if dx >= 0 else "right",
            va="center", fontsize=size, color=group.colour, arrowprops=arrow if line else None,
        )  # fmt: skip
        boxes.append(box)
        lines += line


def at_line_ends(ax: Any, labels: list[Label], x: float, gap: float = 13.0) -> None:
    """Labels in a column right of `x`, at the height of their lines' ends and `gap` points apart."""
    scale = ax.figure.dpi / 72
    labels = sorted(labels, key=lambda at: at.y)
    ends = [float(ax.transData.transform((label.x, label.y))[1]) for label in labels]
    heights = list(ends)
    for _ in range(200):  # neighbours push each other apart
        for i in range(len(heights) - 1):
            short = gap * scale - (heights[i + 1] - heights[i])
            if short > 0:
                heights[i], heights[i + 1] = heights[i] - short / 2, heights[i + 1] + short / 2
    column = float(ax.transData.transform((x, labels[0].y))[0])
    for label, height in zip(labels, heights, strict=True):
        end = ax.transData.transform((label.x, label.y))
        offset = ((column - end[0]) / scale + 22, (height - end[1]) / scale)
        far = label.x < x or abs(offset[1]) > 3
        line = dict(arrowstyle="-", color=LINE, linewidth=0.6, shrinkA=0, shrinkB=4, relpos=(0, 0.5)) if far else None
        ax.annotate(
            label.text, (label.x, label.y), offset, textcoords="offset points", va="center", color=label.colour,
            fontsize=9, arrowprops=line,
        )  # fmt: skip
