"""`python -m bench compare A.json B.json`: what became of every workload that both records have.

A ratio is B's median over A's: above 1 is slower. Where the 20-80 % ranges of the two overlap the difference is within
noise. Exit status: 0; 1 with --fail-above when something of ours got slower than that factor, beyond noise, or is
timed in A and not in B; 2 when the files cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .records import OURS, Record, RecordError, load

COMPARED = ("model", "kernels")
MUST_AGREE = ("kind", "model", "dtype")


@dataclass(frozen=True)
class Change:
    """One provider in two records."""

    before: str  # provider in A and in B: the best peer may be another one
    after: str
    a_ms: float
    b_ms: float
    noise: bool

    @property
    def ratio(self) -> float:
        return self.b_ms / self.a_ms

    @property
    def verdict(self) -> str:
        return "within noise" if self.noise else "slower" if self.ratio > 1 else "faster"


def change(a: dict[str, Any], b: dict[str, Any], before: str | None, after: str | None) -> Change | None:
    """A provider of row `a` against one of row `b`; None where either was not timed."""
    first, second = a["ms"].get(before), b["ms"].get(after)
    if not first or not second:
        return None
    apart = first["q80"] < second["q20"] or second["q80"] < first["q20"]
    return Change(str(before), str(after), first["median"], second["median"], not apart)


def machine(record: Record) -> tuple[Any, ...]:
    """What times depend on more than on the code."""
    env = record["environment"]
    return env["device"], env.get("threads")


def refusal(a: Record, b: Record, across_devices: bool) -> str | None:
    """Why the two say nothing about each other, or None."""
    for record in (a, b):
        if record["kind"] not in COMPARED:
            return f"a {record['kind']} record has no times of one workload to compare; give two of {COMPARED}"
    for field in MUST_AGREE:
        if a.get(field) != b.get(field):
            return f"the {field} differs: {a.get(field)} and {b.get(field)}"
    if machine(a) != machine(b) and not across_devices:
        names = [f"{name}" + (f" ({threads} threads)" if threads else "") for name, threads in map(machine, (a, b))]
        return f"the devices differ: {names[0]} and {names[1]}; --across-devices compares them all the same"
    if not {r["workload"] for r in a["rows"]} & {r["workload"] for r in b["rows"]}:
        return "no workload is in both files"
    return None


def pairs(a: Record, b: Record) -> list[tuple[str, Change | None, Change | None]]:
    """(workload, bert_fast's change, the best peer's) for what both have, in A's order."""
    later = {r["workload"]: r for r in b["rows"]}
    return [
        (r["workload"], change(r, s, OURS, OURS), change(r, s, r["best_peer"], s["best_peer"]))
        for r in a["rows"]
        if (s := later.get(r["workload"]))
    ]


def broken(a: Record, b: Record) -> list[str]:
    """Workloads of ours that A timed and B, which ran them, did not."""
    later = {r["workload"]: r for r in b["rows"]}
    return [r["workload"] for r in a["rows"] if OURS in r["ms"] and OURS not in later.get(r["workload"], r)["ms"]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A.json", help="before")
    parser.add_argument("b", type=Path, metavar="B.json", help="after")
    parser.add_argument("--across-devices", action="store_true", help="although the machines differ")
    parser.add_argument("--fail-above", type=float, metavar="FACTOR", help="exit 1 when ours got slower, such as 1.05")


def run(args: argparse.Namespace) -> int:
    try:
        a, b = load(args.a), load(args.b)
        why_not = refusal(a, b, args.across_devices)
    except RecordError as problem:
        why_not = str(problem)
    if why_not:
        print(f"bench compare: {why_not}", file=sys.stderr)
        return 2
    for name, record in (("A", a), ("B", b)):
        env = record["environment"]
        print(f"{name}  {env['date']}  {env['device']}, torch {env['torch']}, triton {env['triton']}: {env['command']}")
    print(f"\n{'workload':<42}{'A ms':>10}{'B ms':>10}{'B/A':>7}  {'bert_fast':<14}{'best peer B/A':>14}")
    slower = broken(a, b)
    for workload, ours, peer in pairs(a, b):
        text = f"{workload:<42}"
        if ours is None:
            text += f"{'-':>10}{'-':>10}{'-':>7}  {'not timed':<14}"
        else:
            text += f"{ours.a_ms:>10.4f}{ours.b_ms:>10.4f}{ours.ratio:>7.3f}  {ours.verdict:<14}"
            if args.fail_above and ours.ratio > args.fail_above and not ours.noise:
                slower.append(workload)
        if peer is not None:
            text += f"{peer.ratio:>14.3f}  {peer.verdict}"
            text += f" ({peer.before} -> {peer.after})" if peer.before != peer.after else f" ({peer.before})"
        print(text.rstrip())
    for name, one, other in (("A", a, b), ("B", b, a)):
        there = {r["workload"] for r in other["rows"]}
        if alone := [r["workload"] for r in one["rows"] if r["workload"] not in there]:
            print(f"only in {name}: {', '.join(alone)}")
    if args.fail_above and slower:
        print(f"\nslower than {args.fail_above:g} x, or no longer timed: {', '.join(slower)}")
        return 1
    return 0
