"""`python -m bench finetune`: transformers' class and bert_fast's fine-tuned side by side, and their loss curves.

Two tasks by rule (finetune_data.py) on trained weights, each without dropout and with it (finetune_train.py).

- Without dropout the curves must coincide: the first CHECKED losses keep the error rule of docs/design.md (relative L2
  distance to the same steps in float64, at most 1.25 times that of transformers' + 4 eps), which later steps cannot be
  held to, since training magnifies rounding. How far the whole curves are apart is in the record.
- With dropout the random numbers differ, so the curves are near each other only. How near is to be expected is told by
  transformers' class once more, on other random numbers.

Nothing is trained where `explain` says that bert_fast's model would not run fused in the whole.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from bert_fast.demo import DemoError

from . import accuracy, finetune_data, records, timing
from . import finetune_train as train
from .finetune_plots import loss_curves
from .finetune_train import AGAIN, CHECKED, PEER, TRUTH, Lane, Task
from .plots import pyplot
from .progress import Progress
from .records import OURS, Record, RecordError
from .workloads import flops

DROPOUTS = (0.0, 0.1)
QUICK_STEPS, QUICK_BATCH = 6, 4
WARM_UP_STEPS = 3  # not timed where there are more


def count(text: str) -> int:
    if not text.isdecimal() or not 1 <= (number := int(text)) <= 10**6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 1000000")
    return number


def batch_size(text: str) -> int:
    if (number := count(text)) > finetune_data.TRAINING:
        raise argparse.ArgumentTypeError(f"{text} is more than the {finetune_data.TRAINING} training examples")
    return number


def folder(text: str) -> Path:
    if (path := Path(text)).exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=(*train.TASKS, "both"), default="both")
    parser.add_argument("--steps", type=count, metavar="N", help="default: 60 for text, 20 for antibody")
    parser.add_argument("--batch-size", type=batch_size, metavar="N", help="default: 12 for text, 6 for antibody")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    parser.add_argument(
        "--quick", action="store_true", help="few steps; tiny models with random weights where none are installed"
    )
    parser.add_argument(
        "--output", type=folder, default=records.RESULTS, metavar="FOLDER", help="default: bench/results"
    )


def command(argv: list[str]) -> str:
    """The command, less where its results went."""
    words = records.command_line(argv).split(" ")
    at = next((i for i, word in enumerate(words) if word == "--output"), len(words))
    return " ".join(word for word in words[:at] + words[at + 2 :] if not word.startswith("--output="))


def run(args: argparse.Namespace) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = timing.pick_device(args.device)
    dtype = getattr(torch, args.dtype)
    env = records.environment(device, command(sys.argv[1:]))
    try:
        pyplot()
        tasks = [make(args.quick) for name, make in train.TASKS.items() if args.task in (name, "both")]
    except (DemoError, RecordError) as problem:
        print(f"bench finetune: {problem}", file=sys.stderr)
        return 2
    name = "-".join(["finetune", *[args.task] * (args.task != "both"), *["quick"] * args.quick, args.dtype])
    path = args.output / records.result_file(name, device).name
    print(f"{args.dtype}, {env['device']}, " + ", ".join(f"{n} {env[n]}" for n in ("torch", "triton", "transformers")))
    print(f"record: {path.name}\n{records.busy(env)}", end="", flush=True)
    if args.quick:
        for task in tasks:
            task.batch, task.steps, task.validation = QUICK_BATCH, QUICK_STEPS, task.validation[:1]
    sizes = [(args.batch_size or task.batch, args.steps or task.steps) for task in tasks]
    rows: list[dict[str, Any]] = []
    more: Record = {"dtype": args.dtype, "ceilings": timing.ceilings(device, dtype)}
    more |= {"learning_rate": train.LR, "adam_eps": train.ADAM_EPS, "checked_steps": CHECKED}
    with Progress(len(DROPOUTS) * sum(steps for _, steps in sizes), "bench finetune") as bar:
        for task, (batch, steps) in zip(tasks, sizes, strict=True):
            for dropout in DROPOUTS:
                row = case(task, dropout, batch, steps, device, dtype, more["ceilings"], bar)
                if row is None:
                    return 1
                rows.append(row)
                records.add_load_after(env)
                records.save(path, "finetune", env, rows, **more)
    _, figure = loss_curves({"rows": rows})
    figure.savefig(path.with_name(f"{path.stem}-loss.png"), format="png")
    pyplot().close(figure)
    print(f"picture: {path.stem}-loss.png")
    return int(not all(row["ok"] for row in rows))


def case(
    task: Task, dropout: float, batch: int, steps: int, device: torch.device, dtype: torch.dtype,
    top: dict[str, float], bar: Progress,
) -> dict[str, Any] | None:  # fmt: skip
    """A row of the record; None, and the reason printed, where bert_fast's model would run transformers' code."""
    batches = task.train(batch, steps)
    running = train.lanes(task, dropout, device, dtype)
    lanes = {lane.name: lane for lane in running}
    name = f"{task.name}, dropout {dropout:g}"
    told = train.explained(lanes[OURS], {k: v.to(device) for k, v in batches[0].items()})
    bar.say(f"\n{name}: {task.about}\n  {OURS} runs in the {told.tier} tier, padding {told.padding}")
    if told.tier != "encoder":
        bar.say(f"bench finetune: {OURS} would not run fused, so there is nothing to compare: {told.reason}")
        return None
    train.run(running, batches, bar, name)
    kept = {lane.name: lane for lane in running if lane.name != TRUTH}
    validation = {lane: kept[lane].validate(task.validation) for lane in kept}
    losses = {lane.name: lane.losses for lane in running}
    times = {lane: timed(kept[lane]) for lane in (PEER, OURS)}
    found = {"check": [], "ok": all(x == x for xs in losses.values() for x in xs)}
    if not dropout:
        found = verdict(losses, dtype)
    row = {
        "workload": f"{name} {batch}x{batches[0]['input_ids'].shape[1]}",
        **{"name": name, "task": task.name, "about": task.about, "dropout": dropout, "batch": batch, "steps": steps},
        **{"tier": told.tier, "padding": told.padding, "weights": "random" if task.source is None else "trained"},
        **{"losses": losses, "seconds": {lane: kept[lane].seconds for lane in (PEER, OURS)}},
        **{"validation": validation, "apart": apart(losses), "ms": {n: asdict(t) for n, t in times.items()}},
        **{"best_peer": PEER, "speed_up": times[PEER].median / times[OURS].median, "notes": {}, "memory_mib": {}},
        **found,
    }
    work = statistics.mean(training_flops(task, lanes[PEER].model.config, b) for b in batches)
    rate = work / times[OURS].median * 1e3
    row |= {"flops": work, "bytes": None, "rate": rate, "share": rate / top["gemm"]}
    bar.say(shown(row))
    return row


def timed(lane: Lane) -> timing.Timing:
    seconds = lane.seconds[WARM_UP_STEPS:] or lane.seconds[-1:]
    return timing.Timing.of([1e3 * s for s in seconds])


def verdict(losses: dict[str, list[float]], dtype: torch.dtype) -> dict[str, Any]:
    """The error rule over the steps that were taken in float64."""
    truth = torch.tensor(losses[TRUTH], dtype=torch.float64)
    ours, peer = (torch.tensor(losses[lane][: len(truth)], dtype=torch.float64) for lane in (OURS, PEER))
    error, limit = accuracy.error_and_limit([ours], [peer], [truth], dtype)
    return {"check": [{"name": "losses", "error": error, "limit": limit, "ok": error <= limit}], "ok": error <= limit}


def apart(losses: dict[str, list[float]]) -> dict[str, float]:
    """Relative L2 distance of whole curves from transformers'."""
    peer = torch.tensor(losses[PEER], dtype=torch.float64)
    others = {n: torch.tensor(losses[n], dtype=torch.float64) for n in (OURS, AGAIN) if n in losses}
    return {n: ((x - peer).norm() / peer.norm()).item() for n, x in others.items()}


def training_flops(task: Task, config: transformers.BertConfig, batch: dict[str, torch.Tensor]) -> float:
    """Three times the forward's products of the real tokens: a backward has two products for each."""
    lengths = batch["attention_mask"].sum(1)
    forward = flops(config, lengths, config.num_labels if task.name == "text" else 0)
    if task.name == "antibody":  # no pooler; a dense layer and the vocabulary for every token
        h = config.hidden_size
        forward += 2 * h * (lengths.sum().item() * (h + config.vocab_size) - len(lengths) * h)
    return 3 * forward


def shown(row: dict[str, Any]) -> str:
    lines = []
    for lane in (PEER, OURS, AGAIN):
        if lane in row["validation"]:
            losses, held = row["losses"][lane], row["validation"][lane]
            text = f"  {lane:<20} loss {losses[0]:.4f} -> {losses[-1]:.4f}   validation: loss {held['loss']:.4f}, "
            lines.append(text + f"accuracy {held['accuracy']:.1%}")
    for line in row["check"]:
        text = f"error of the first {len(row['losses'][TRUTH])} losses {line['error']:.2e}, limit {line['limit']:.2e}"
        lines.append(f"  {text}: {'ok' if line['ok'] else 'FAILED'}")
    distances = ", ".join(f"{lane} {value:.1e}" for lane, value in row["apart"].items())
    lines.append(f"  whole curve, distance from transformers': {distances}")
    peer, ours = (row["ms"][lane]["median"] / 1e3 for lane in (PEER, OURS))
    lines.append(f"  a step: {peer:.3f} s transformers, {ours:.3f} s {OURS}, {row['speed_up']:.2f}x")
    return "\n".join(lines)
