"""`python -m bench tune`: search tiles on the GPU at hand and write them into kernels/<architecture>.json.

Every candidate is compiled, held against the op's reference in float64, and only then timed, by CUDA-graph replay in
turns with the present entry; what fails or is wrong is counted and dropped. The best few are timed again together. An
entry is replaced when the best one's median is at least 2 % better. The table is written after every key.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bert_fast.kernels import configs
from bert_fast.kernels.configs import TileConfig

from . import records, timing
from .accuracy import error_and_limit, poisoned
from .progress import Progress
from .tune_space import LAYERS, OPS, Built, build, candidates, keys_of, outputs, problem_of
from .tune_table import entry_text, replaced

GAIN = 0.98  # a new entry's median over the present one's, at most
SCREEN_ROUNDS, FINAL_ROUNDS, FINALISTS = 3, 15, 4
SHARED_DEFAULT = 232448  # bytes of shared memory a block may use, where no GPU says: sm_90's
Times = dict[TileConfig, timing.Timing]


class Broken(Exception):
    """The GPU's context is lost; nothing more can be measured in this process."""


@dataclass
class Outcome:
    """What the search of one key found."""

    times: Times = field(default_factory=dict)  # of the final round
    tried: int = 0
    wrong: int = 0
    failed: int = 0
    why: str = ""  # the last failure


def select(times: dict[TileConfig, float], present: TileConfig) -> TileConfig:
    """The entry to keep, from medians: the present one unless another is at least 2 % better, or it does not run."""
    best = min(times, key=times.__getitem__, default=present)
    if present not in times:
        return best
    return best if times[best] <= GAIN * times[present] else present


def finalists(ratios: dict[TileConfig, float]) -> list[TileConfig]:
    """The best few of the screening, by their time over the present entry's in the same turns."""
    return sorted(ratios, key=ratios.__getitem__)[:FINALISTS]


class Search:
    """The candidates of one key on the GPU."""

    def __init__(self, built: Built, device: torch.device, dtype: torch.dtype) -> None:
        self.built, self.device, self.dtype, self.outcome = built, device, dtype, Outcome()
        self.low, self.truth = (outputs(built.reference(t)) for t in (dtype, torch.float64))

    def right(self, config: TileConfig) -> bool:
        """Compiles, runs and computes what the reference does."""
        self.outcome.tried += 1
        try:
            with poisoned():
                found = outputs(self.built.launch(config, 0))
                error, limit = error_and_limit(found, self.low, self.truth, self.dtype)
        except Exception as problem:  # out of shared memory or registers, no such instruction: a fact of this GPU
            self.failed(timing.one_line(problem))
            return False
        self.outcome.wrong += not error <= limit
        return error <= limit

    def failed(self, why: str) -> None:
        self.outcome.failed += 1
        self.outcome.why = why
        try:
            torch.cuda.synchronize(self.device)
        except Exception as problem:
            raise Broken(why) from problem

    def time(self, tiles: list[TileConfig], rounds: int) -> Times:
        problems: dict[str, str] = {}
        names = {entry_text(c): c for c in tiles}
        calls = {name: self.call(c) for name, c in names.items()}
        times = timing.in_turns(calls, self.device, rounds, graph=True, problems=problems)
        for why in problems.values():
            self.failed(why)
        return {names[name]: t for name, t in times.items()}

    def call(self, config: TileConfig) -> Any:
        turn = itertools.cycle(range(LAYERS))
        return lambda: self.built.launch(config, next(turn))

    def run(self, present: TileConfig, tiles: list[TileConfig], step: Any) -> Outcome:
        base = [present] if self.right(present) else []
        ratios: dict[TileConfig, float] = {}
        for config in tiles:
            if self.right(config):
                times = self.time([*base, config], SCREEN_ROUNDS)
                if config in times:
                    against = times[present].median if present in times else 1.0
                    ratios[config] = times[config].median / against
            step()
        self.outcome.times = self.time([*base, *finalists(ratios)], FINAL_ROUNDS)
        return self.outcome


def row(key: str, present: TileConfig, kept: TileConfig, outcome: Outcome) -> dict[str, Any]:
    medians = {c: t.median for c, t in outcome.times.items()}
    best = min((c for c in medians if c != present), key=medians.__getitem__, default=None)
    ms = {name: asdict(outcome.times[c]) for name, c in (("before", present), ("best", best)) if c in outcome.times}
    return {
        "workload": key,
        "problem": str(problem_of(key)),
        "before": entry_text(present),
        "best": entry_text(best) if best else None,
        "written": kept != present,
        "ms": ms,
        "best_peer": None,
        **{name: getattr(outcome, name) for name in ("tried", "wrong", "failed", "why")},
        "finalists": [{"tile": entry_text(c), **asdict(t)} for c, t in outcome.times.items()],
    }


def shown(line: dict[str, Any]) -> str:
    before, best = ((f"{t['median'] * 1e3:.1f}" if (t := line["ms"].get(n)) else "-") for n in ("before", "best"))
    counts = f"{line['tried']:>6}{line['wrong']:>6}{line['failed']:>7}"
    text = f"{line['workload']:<36}{line['problem']:<16}{before:>10}{best:>10}{counts}"
    return f"{text}   {'now ' + line['best'] if line['written'] else 'kept'}"


HEADING = f"{'table key':<36}{'problem':<16}{'before us':>10}{'best us':>10}{'tried':>6}{'wrong':>6}{'failed':>7}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=OPS, action="append", help="only this op's entries; repeatable")
    parser.add_argument("--only", metavar="TEXT", help='keys that have this in them, such as "rows<=128"')
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="only tiles that differ from the present one in one field")
    parser.add_argument("--dry-run", action="store_true", help="print the candidates; needs no GPU")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: kernels/<architecture>.json")
    parser.add_argument("--record", type=Path, metavar="FILE", help="default: bench/results/<device>-tune-<date>.json")


def run(args: argparse.Namespace) -> int:
    on_gpu = torch.cuda.is_available() and torch.version.hip is None
    if not on_gpu and not args.dry_run:
        print("bench tune: this torch sees no CUDA device to tune for; --dry-run lists the candidates", file=sys.stderr)
        return 2
    capability, shared = (9, 0), SHARED_DEFAULT
    device = timing.pick_device("cuda") if on_gpu else torch.device("cpu")
    if on_gpu:
        capability = torch.cuda.get_device_capability(device)
        properties = torch.cuda.get_device_properties(device)
        shared = getattr(properties, "shared_memory_per_block_optin", SHARED_DEFAULT)
    arch, dtype = configs.arch_name(capability), getattr(torch, args.dtype)
    table = configs.table(arch)
    keys = [key for key in keys_of(table, tuple(args.op or OPS), dtype) if not args.only or args.only in key]
    todo = {key: candidates(key, table[key], capability, shared, args.quick) for key in keys}
    if not todo:
        print(f"bench tune: no entry of {arch} is meant; there are: {', '.join(keys_of(table, OPS, dtype))}")
        return 2
    if args.dry_run:
        for key, tiles in todo.items():
            print(f"{key}  {problem_of(key)}, now {entry_text(table[key])}; {len(tiles)} candidates on {arch}:")
            print("".join(f"  {entry_text(c)}\n" for c in tiles), end="")
        print(f"{sum(map(len, todo.values()))} candidates for {len(todo)} entries")
        return 0
    return tune(args, todo, table, device, dtype, args.out or configs.FOLDER / f"{arch}.json")


def tune(
    args: argparse.Namespace,
    todo: dict[str, list[TileConfig]],
    table: dict[str, TileConfig],
    device: torch.device,
    dtype: torch.dtype,
    out: Path,
) -> int:
    env = records.environment(device, records.command_line())
    record = args.record or records.result_file(f"tune-{args.dtype}", device)
    print(f"{args.dtype}, {env['device']}, torch {env['torch']}, triton {env['triton']}; table: {out.name}")
    print(f"record: {record.name}\n\n{HEADING}")
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), Progress(sum(map(len, todo.values())), "bench tune") as bar:
        for key, tiles in todo.items():
            present = table[key]
            bar.at(key)
            try:
                outcome = Search(build(problem_of(key), device, dtype), device, dtype).run(present, tiles, bar.step)
            except Broken as problem:
                bar.say(f"{key}: the GPU's context is lost ({problem}); what came before is written")
                return 1
            except torch.OutOfMemoryError as problem:
                bar.say(f"{key}: not tuned, {timing.one_line(problem)}")
                continue
            kept = select({c: t.median for c, t in outcome.times.items()}, present)
            if kept != present:
                text = out.read_text() if out.exists() else ""
                out.write_text(replaced(text, {key: kept}))
            rows.append(row(key, present, kept, outcome))
            bar.say(shown(rows[-1]))
            records.save(record, "tune", env, rows, dtype=args.dtype)
    configs.table.cache_clear()
    return 0
