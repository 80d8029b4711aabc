"""One workload of `bench model`: checked, its peers compiled, all timed in turns; a row of the record.

Correctness comes first, by the rule of `bert_fast.demo.judge`; a workload that fails it is not timed. A peer that fails
is noted.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from bert_fast.demo import Tensors, Verdict, collect, judge, kept_positions, zero_dropped
from bert_fast.explain import explanation

from . import peers, timing
from .peers import COMPILE, Models
from .progress import Progress
from .records import OURS
from .variants import VARIANTS, in_variant, why_not
from .workloads import Workload, flops, inputs_of, least_bytes


@dataclass
class Session:
    """What stays the same from workload to workload."""

    size: str
    device: torch.device
    dtype: torch.dtype
    quick: bool
    compile_left_s: float  # seconds left for torch.compile
    top: dict[str, float]  # ceilings
    bar: Progress
    models: Models
    variants: tuple[str, ...] = ()  # of VARIANTS, timed beside OURS
    truth: torch.nn.Module | None = None  # half types are held against float64, fp32 against eager fp32 itself
    compiled_for: tuple = ()
    compiled: Any = None  # -> (calls, notes) of that workload

    @property
    def rounds(self) -> int:
        return (7 if self.quick else 15) if self.device.type == "cpu" else (10 if self.quick else 20)

    def free(self) -> None:
        self.models, self.truth, self.compiled_for, self.compiled = {}, None, (), None
        torch.compiler.reset()  # what it compiled holds the models before, and pools of CUDA graphs
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def load(self, work: Workload) -> None:
        self.free()
        self.models = peers.load_all(self.size, work, self.device, self.dtype)
        if self.dtype != torch.float32:
            self.truth = copy.deepcopy(self.models["eager"]).double()

    def compile(self, work: Workload, arguments: dict[str, Any]) -> tuple[timing.Calls, dict[str, str]]:
        """torch.compile's providers for a workload, those that compile; -> calls and notes."""
        if self.compiled_for == work.peers_run:  # two of our padding modes over the same batch
            return self.compiled
        self.compiled = None
        torch.compiler.reset()
        calls, notes = {}, {}
        for mode in peers.modes(work, self.device, self.quick):
            name = COMPILE + mode
            if self.compile_left_s <= 0:
                notes[name] = "not run: the time given to torch.compile was spent"
                continue
            self.bar.at(f"{work.label}: compiling, {mode}")
            start = time.perf_counter()
            try:
                run = peers.compiled(self.models, work, mode)
                run(**arguments)
                calls[name] = lambda f=run: f(**arguments)
            except Exception as problem:  # a peer that cannot compile is a fact to print, not the bench's end
                notes[name] = timing.one_line(problem)
            self.compile_left_s -= time.perf_counter() - start
        self.compiled_for, self.compiled = work.peers_run, (calls, notes)
        return calls, notes


def upstream_reason(model: torch.nn.Module, arguments: dict[str, Any]) -> str | None:
    """Why bert_fast would run transformers' own code here: then there is nothing of ours to check or to time."""
    told = explanation(model, **arguments)
    return told.reason if told.tier != "encoder" else None


def check(session: Session, work: Workload, inputs: dict, wanted: dict[str, bool]) -> list[Verdict]:
    """The rule of bert_fast.demo over the outputs the workload asks for, logits of a head among them.

    Ours has been called twice before: where it is a CUDA graph that is timed, its replay is what is checked.
    """
    for _ in range(2):
        session.models[OURS](**inputs, **wanted)
    kept = kept_positions(inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])), work.padding)

    def outputs(model: torch.nn.Module, **flags: bool) -> Tensors:
        result = model(**inputs, **flags)
        found = collect(result) if model is session.models[OURS] else zero_dropped(collect(result), kept)
        return found | ({"logits": (result.logits,)} if work.head else {})

    ours, eager = outputs(session.models[OURS], **wanted), outputs(session.models["eager"], **wanted)
    if session.truth is not None:
        return judge(ours, eager, truth=outputs(session.truth, **wanted))
    hidden = {k: v for k, v in wanted.items() if k != "output_attentions"}
    return judge(ours, eager, outputs(session.models["sdpa"], **hidden))


def measure(session: Session, work: Workload) -> dict[str, Any]:
    """One row of the record."""
    models, device = session.models, session.device
    config = models["eager"].config
    inputs, lengths = inputs_of(work, config.vocab_size, device)
    wanted = {f"output_{name}": True for name in work.outputs}
    arguments = {**inputs, **wanted}
    models[OURS].set_padding(work.padding)
    notes: dict[str, str] = {}
    times: dict[str, timing.Timing] = {}
    memory: dict[str, float | None] = {}
    variants: list[str] = []  # those that ran and were checked
    apart: dict[str, timing.Apart] = {}
    verdicts: list[Verdict] = []
    session.bar.at(f"{work.label}: checking")
    reason = upstream_reason(models[OURS], arguments)
    if reason:
        notes[OURS] = f"runs transformers' code: {reason}"
    else:
        try:
            verdicts = check(session, work, inputs, wanted)
        except torch.OutOfMemoryError as problem:
            notes[OURS] = f"not checked: {timing.one_line(problem)}"
        for name in session.variants if verdicts else ():
            try:
                if reason := why_not(name, models[OURS], arguments):
                    notes[name] = reason
                    continue
                with VARIANTS[name].select():
                    found = check(session, work, inputs, wanted)
            except Exception as problem:  # it is no reason to end the bench, and it is not timed
                notes[name] = f"not checked: {timing.one_line(problem)}"
                continue
            verdicts += [replace(v, name=f"{name}: {v.name}") for v in found]
            variants.append(name)
    if verdicts and all(v.ok for v in verdicts):
        calls: dict[str, Callable[[], object]] = {}
        for name, model in models.items():
            if not (name == "sdpa" and "attentions" in work.outputs):
                calls[name] = lambda m=model: m(**arguments)
        calls |= {name: in_variant(name, models[OURS], arguments) for name in variants}
        if session.compile_left_s != float("-inf"):
            compiled, why = session.compile(work, arguments)
            calls, notes = compiled | calls, notes | why
        session.bar.at(f"{work.label}: timing")
        times = timing.in_turns(calls, device, session.rounds, problems=notes)
        memory = {name: timing.peak_memory(calls[name], device) for name in times}
        if device.type == "cuda":
            for name in [n for n in (OURS, *variants) if n in times]:  # chosen outside: no part of the host's time
                with VARIANTS[name].select() if name in VARIANTS else contextlib.nullcontext():
                    apart[name] = timing.apart(calls[OURS], device)
    labels = config.num_labels if work.head else 0
    counted = flops(config, lengths, labels), least_bytes(config, work, lengths, session.dtype.itemsize)
    line = row(work, lengths, times, verdicts, counted, notes, session.top) | {"memory_mib": memory}
    return line | {part: {n: getattr(a, part) for n, a in apart.items()} for part in timing.Apart._fields}


def row(
    work: Workload,
    lengths: torch.Tensor,
    times: dict[str, timing.Timing],
    verdicts: list[Verdict],
    counted: tuple[float, float],
    notes: dict[str, str],
    top: dict[str, float],
) -> dict[str, Any]:
    others = {n: t.median for n, t in times.items() if n not in (OURS, *VARIANTS)}
    best = min(others, key=others.__getitem__, default=None)
    ours = times[OURS].median if OURS in times else None
    rate = counted[0] / ours * 1e3 if ours else None
    return {
        "workload": work.label,
        **asdict(work),
        "rows": work.batch * work.seq,
        "tokens": int(lengths.sum()),
        "ok": ours is not None and all(v.ok for v in verdicts),
        "check": [{**asdict(v), "ok": v.ok} for v in verdicts],
        "ms": {n: asdict(t) for n, t in times.items()},
        "best_peer": best,
        "speed_up": others[best] / ours if best and ours else None,
        "flops": counted[0],
        "bytes": counted[1],
        "rate": rate,
        "share": rate / top["gemm"] if rate else None,
        "notes": notes,
    }
