"""Figures of a record: speed-up bars, roofline, latency. matplotlib, imported on use.

Colours are Okabe and Ito's, told apart by every common kind of colour vision; lines and points are labelled where they
stand. Every figure is drawn from the record alone.
"""

from __future__ import annotations

from typing import Any

from .labels import Group, Label, at_line_ends, beside_points
from .records import OURS, Record, RecordError
from .timing import quantity

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6BB1", "#7F7F7F")
OURS_COLOUR, SLOWER_COLOUR, EQUAL_COLOUR = COLOURS[0], COLOURS[1], "#9A9A9A"
MARKERS = "os^DvP*X"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "figure.facecolor": "white",
    "savefig.dpi": 130,
}
Figure = Any


def pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as problem:
        raise RecordError("plots need matplotlib: pip install 'bert-fast[bench]'") from problem
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(STYLE)
    return plt


def figures(record: Record) -> dict[str, tuple[str, Figure]]:
    """name -> (caption, figure): those that the record has the numbers for."""
    from .finetune_plots import loss_curves  # which takes its colours from here

    made = {"speed-up": speed_up(record), "roofline": roofline(record), "latency": latency(record)}
    made["loss"] = loss_curves(record) if record["kind"] == "finetune" else None
    return {name: found for name, found in made.items() if found}


def gain(row: dict[str, Any]) -> tuple[float, float, float] | None:
    """Speed-up over the best peer: (median, low, high); the ends hold one's fast quantile against the other's slow."""
    ours, peer = row["ms"].get(OURS), row["ms"].get(row["best_peer"])
    if not ours or not peer:
        return None
    return peer["median"] / ours["median"], peer["q20"] / ours["q80"], peer["q80"] / ours["q20"]


def speed_up(record: Record) -> tuple[str, Figure] | None:
    rows = [(r, g) for r in record["rows"] if (g := gain(r))]
    if not rows:
        return None
    labels = []
    height, small = (0.34, 9) if len(rows) <= 20 else (0.25, 8)
    fig, ax = pyplot().subplots(figsize=(7.5, 0.8 + height * len(rows)), layout="constrained")
    top = max(g[2] for _, g in rows)
    for y, (row, (median, low, high)) in enumerate(rows):
        colour = OURS_COLOUR if low > 1 else SLOWER_COLOUR if high < 1 else EQUAL_COLOUR
        ax.barh(y, median, color=colour, height=0.68)
        spread = [[max(median - low, 0.0)], [max(high - median, 0.0)]]
        ax.errorbar(median, y, xerr=spread, color="black", linewidth=1, capsize=2)
        peer = row["best_peer"].replace("compile/", "compile ")
        at = max(median, high) + 0.015 * top
        label = ax.text(at, y, f"{median:.2f}x  {peer}", va="center", fontsize=small)
        labels.append(label)
        label.set_bbox(dict(facecolor="white", edgecolor="none", pad=0.5))  # over the line at 1
    ax.axvline(1, color="black", linewidth=1)
    ax.set(yticks=range(len(rows)), yticklabels=[row["workload"] for row, _ in rows], xlim=(0, 1.4 * top))
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0, labelsize=small)
    ax.set_xlabel("speed-up over the best other provider, named at the bar")
    fig.canvas.draw()  # the words' widths are known only now
    frame, renderer = ax.get_window_extent(), fig.canvas.get_renderer()
    room = [1 - (label.get_window_extent(renderer).width + 12) / frame.width for label in labels]
    ax.set_xlim(0, max(label.get_position()[0] / max(r, 0.2) for label, r in zip(labels, room, strict=True)))
    return (
        "Speed-up of bert_fast over the fastest other provider of each row: blue faster, orange slower, grey within "
        "noise. Lines: the 20 % quantile of one against the 80 % quantile of the other.",
        fig,
    )


def roofline(record: Record) -> tuple[str, Figure] | None:
    top = record.get("ceilings")
    points = [r for r in record["rows"] if r["flops"] and r["bytes"] and OURS in r["ms"]] if top else []
    if not points:
        return None
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(7.5, 5.6), layout="constrained")
    xs = [r["flops"] / r["bytes"] for r in points]
    ys = [r["flops"] / r["ms"][OURS]["median"] * 1e3 for r in points]
    ridge = top["gemm"] / top["copy"]
    left, right = min(*xs, ridge) / 2.5, max(*xs, ridge) * 6
    ax.plot([left, ridge, right], [left * top["copy"], top["gemm"], top["gemm"]], color="black", linewidth=1.2)
    ax.set(xscale="log", yscale="log", xlim=(left, right))
    ax.set_ylim(min(*ys, left * top["copy"]) / 1.6, top["gemm"] * 2.2)
    size = int(top["gemm_size"])
    gemm, copy = quantity(top["gemm"], "FLOP/s"), quantity(top["copy"], "B/s")
    ax.annotate(f"{size}³ matrix product, {gemm}", (ridge, top["gemm"]), (0, 5), textcoords="offset points")
    kernels = record["kind"] == "kernels"
    of_point = [r["op"] if kernels else r["workload"] for r in points]
    groups = list(dict.fromkeys(of_point))
    shapes = list(dict.fromkeys(shape_of(r) for r in points)) if kernels else [""]
    for row, x, y in zip(points, xs, ys, strict=True):
        colour = COLOURS[groups.index(row["op"]) % len(COLOURS)] if kernels else OURS_COLOUR
        marker = MARKERS[shapes.index(shape_of(row)) % len(MARKERS)] if kernels else "o"
        ax.plot(x, y, marker, color=colour, markersize=6, alpha=0.85, markeredgewidth=0)
    for i, shape in enumerate(shapes if len(shapes) > 1 else ()):
        ax.plot([], [], MARKERS[i % len(MARKERS)], color="#555555", label=shape, linestyle="none")
    if len(shapes) > 1:
        ax.legend(frameon=False, fontsize=8, loc="lower right")
    named = []
    for i, group in enumerate(groups):
        of_group = [(x, y) for g, x, y in zip(of_point, xs, ys, strict=True) if g == group]
        named.append(Group(group, of_group, COLOURS[i % len(COLOURS)] if kernels else "black"))
    fig.canvas.draw()  # places are known only now
    angle = slope(ax, left, ridge, top["copy"])
    x = (left * ridge) ** 0.5
    spot = ((x, x * top["copy"]), (0, 5))
    ax.annotate(f"copy, {copy}", *spot, textcoords="offset points", ha="center", rotation=angle, rotation_mode="anchor")
    roof = [left * (right / left) ** (i / 60) for i in range(61)]  # labels keep clear of it too
    beside_points(ax, named, [(x, min(x * top["copy"], top["gemm"])) for x in roof])
    ax.set(xlabel="FLOP per byte that must be moved", ylabel="FLOP/s")
    what = "One point an op and shape" if kernels else "One point a workload"
    return f"{what}: work by formula over its time, under the two ceilings measured in the same run.", fig


def shape_of(row: dict[str, Any]) -> str:
    """"base 32x512 768->768" -> "base 32x512"."""
    return " ".join(row.get("shape", "").split()[:2])


def slope(ax: Any, x0: float, x1: float, factor: float) -> float:
    """Angle on paper, in degrees, of the line y = factor * x."""
    import numpy as np

    (a, b), (c, d) = ax.transData.transform([(x0, x0 * factor), (x1, x1 * factor)])
    return float(np.degrees(np.arctan2(d - b, c - a)))


def latency(record: Record) -> tuple[str, Figure] | None:
    """Dense workloads of one model: milliseconds against rows, a line a provider."""
    rows = [r for r in record["rows"] if r.get("name") == "dense" and r["ms"]] if record["kind"] == "model" else []
    rows.sort(key=lambda r: (r["rows"], r["seq"]))
    if len({r["rows"] for r in rows}) < 2:
        return None
    providers = list(dict.fromkeys(name for r in rows for name in r["ms"]))
    fig, ax = pyplot().subplots(figsize=(7.5, 4.6), layout="constrained")
    ends = []
    for i, name in enumerate(sorted(providers, key=lambda n: n != OURS)):
        timed = [(r["rows"], r["ms"][name]) for r in rows if name in r["ms"]]
        xs, ys = [x for x, _ in timed], [t["median"] for _, t in timed]
        low = [max(t["median"] - t["q20"], 0) for _, t in timed]
        high = [max(t["q80"] - t["median"], 0) for _, t in timed]
        ours = name == OURS
        ax.errorbar(
            xs, ys, yerr=[low, high], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], capsize=2,
            linewidth=2.4 if ours else 1.3, markersize=5, zorder=3 if ours else 2,
        )  # fmt: skip
        ends.append(Label(name.replace("compile/", "compile "), xs[-1], ys[-1], COLOURS[i % len(COLOURS)]))
    ticks = sorted({r["rows"] for r in rows})
    shapes = {n: "\n".join(f"{r['batch']}x{r['seq']}" for r in rows if r["rows"] == n) for n in ticks}
    ax.set(xscale="log", yscale="log", xlim=(ticks[0] / 1.5, ticks[-1] * (ticks[-1] / ticks[0]) ** 0.4))
    ax.set_xticks(ticks, [f"{n}\n{shapes[n]}" for n in ticks], fontsize=8.5)
    ax.minorticks_off()
    from matplotlib.ticker import FuncFormatter, LogLocator

    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    fig.canvas.draw()
    at_line_ends(ax, ends, ticks[-1])
    ax.set(xlabel="rows (tokens), batch x length", ylabel="milliseconds a forward")
    return "Time of a dense forward against the number of rows; both axes logarithmic, lines at the 20-80 % range.", fig
