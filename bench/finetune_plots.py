"""The loss curves of a `bench finetune` record, drawn from the record alone: a row a task, a column a dropout."""

from __future__ import annotations

from typing import Any

from .finetune_train import AGAIN, PEER
from .plots import COLOURS, EQUAL_COLOUR, OURS_COLOUR, Figure, pyplot
from .records import OURS, Record

LINES: dict[str, dict[str, Any]] = {  # in the order they are drawn
    AGAIN: dict(color=EQUAL_COLOUR, linewidth=1.0, label="transformers, other random numbers"),
    PEER: dict(color=COLOURS[4], linewidth=3.0, label="transformers"),
    OURS: dict(color=OURS_COLOUR, linewidth=1.4, linestyle=(0, (4, 1.5)), label="bert_fast"),
}


def loss_curves(record: Record) -> tuple[str, Figure]:
    """-> (caption, figure)"""
    rows = record["rows"]
    tasks, dropouts = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "dropout"))
    fig, grid = pyplot().subplots(
        len(tasks), len(dropouts), figsize=(4.2 * len(dropouts), 0.4 + 2.9 * len(tasks)), sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    drawn: dict[str, Any] = {}
    for row in rows:
        ax = grid[tasks.index(row["task"])][dropouts.index(row["dropout"])]
        for lane, style in LINES.items():
            if lane in row["losses"]:
                losses = row["losses"][lane]
                (line,) = ax.plot(range(1, len(losses) + 1), losses, **style)
                drawn.setdefault(style["label"], line)
        ax.set(title=row["name"])
        ax.xaxis.get_major_locator().set_params(integer=True)
        said = [f"{LINES[n]['label']} {row['validation'][n]['accuracy']:.1%}" for n in (PEER, OURS)]
        ax.text(0.03, 0.05, "\n".join(["validation accuracy", *said]), transform=ax.transAxes, fontsize=8)
    for line in grid:
        line[0].set_ylim(0)
    for ax in grid[-1]:
        ax.set_xlabel("step")
    for line in grid:
        line[0].set_ylabel("training loss")
    order = [style["label"] for style in reversed(LINES.values()) if style["label"] in drawn]
    fig.legend([drawn[label] for label in order], order, loc="outside lower center", ncols=len(order), frameon=False)
    return (
        "Training loss of transformers' class and of bert_fast's from the same weights, on the same batches. Without "
        "dropout the two lie on each other; with it they draw different random numbers.",
        fig,
    )
