"""What people run around a model: sentence-transformers' encode, its transformer module, a transformers pipeline.

MiniLM's weights; `transformers` is the object as it is, `bert_fast` a second one after bert_fast.accelerate. Sentences
are drawn by a stated rule (`texts`), with the spread of lengths of real text. `encode` sorts them by length, so that a
batch has little padding; the transformer module gets them in the order drawn.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import bert_fast
from bert_fast.demo import minilm_dir

from . import finetune_data as words
from . import records, timing
from .progress import Progress
from .records import OURS
from .workloads import LOGNORMAL_SIGMA

PEER = "transformers"
MEDIAN_WORDS = 16  # of a sentence; the logarithm's sigma is the workloads'
BATCH = 32
TOLERANCE = 1e-5  # of fp32 embeddings, times the largest magnitude
Pair = dict[str, Callable[[], Any]]


def texts(n: int, seed: int = 0) -> list[str]:
    """n sentences: words of bench finetune's reviews in random order, a lognormal number of them, at least one."""
    rng = random.Random(seed)
    known = sorted({*words.THINGS, *words.ADJECTIVES[0], *words.ADJECTIVES[1], *" ".join(words.BEFORE).split()})
    counts = [max(1, round(rng.lognormvariate(0, LOGNORMAL_SIGMA) * MEDIAN_WORDS)) for _ in range(n)]
    return [" ".join(rng.choices(known, k=count)) for count in counts]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--sentences", type=int, default=2000, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each, in turns; default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: one in bench/results, named as theirs")


def run(args: argparse.Namespace) -> int:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        print("bench sentences needs sentence-transformers: pip install 'bert-fast[embed]'")
        return 2
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device, folder = timing.pick_device(args.device), str(minilm_dir())
    out = args.out or records.result_file("sentences", device)
    env = records.environment(device, records.command_line())
    print(f"{env['device']}, torch {env['torch']}\nrecord: {out.name}\n{records.busy(env)}", end="", flush=True)
    sentences = texts(args.sentences)
    theirs, ours = (SentenceTransformer(folder, device=str(device)) for _ in range(2))
    pipes = [transformers.pipeline("feature-extraction", model=folder, device=device) for _ in range(2)]
    bert_fast.accelerate(ours)
    bert_fast.accelerate(pipes[1])
    skipping = bert_fast.accelerate(SentenceTransformer(folder, device=str(device)), padding="skip")
    batches = [ours.preprocess(sentences[i : i + BATCH]) for i in range(0, len(sentences), BATCH)]
    some = sentences[: max(1, len(sentences) // 4)]

    def encode(model: Any) -> Callable[[], Any]:
        return lambda: model.encode(sentences, batch_size=BATCH, convert_to_tensor=True)

    @torch.inference_mode()
    def embedded(model: Any) -> torch.Tensor:
        placed = [{k: x.to(device) if torch.is_tensor(x) else x for k, x in batch.items()} for batch in batches]
        return torch.cat([model[1](model[0](features))["sentence_embedding"] for features in placed])

    def extracted(pipe: Any) -> Callable[[], Any]:
        return lambda: [x[0].mean(0) for x in pipe(some, batch_size=BATCH, return_tensors=True)]

    work: dict[str, Pair] = {
        f"encode, {len(sentences)} sentences": {PEER: encode(theirs), OURS: encode(ours)},
        f"module, {len(sentences)} unsorted, skip": {PEER: lambda: embedded(theirs), OURS: lambda: embedded(skipping)},
        f"pipeline, {len(some)} sentences": {PEER: extracted(pipes[0]), OURS: extracted(pipes[1])},
    }
    rows: list[dict[str, Any]] = []
    with Progress(len(work), "bench sentences") as bar:
        for name, calls in work.items():
            rows.append(measure(name, calls, device, args.rounds, len(some) if "pipeline" in name else len(sentences)))
            bar.say(shown(rows[-1]))
            records.save(out, "sentences", env, rows, model="minilm", dtype="float32", unit="texts/s")
            bar.step()
    records.add_load_after(env)
    records.save(out, "sentences", env, rows, model="minilm", dtype="float32", unit="texts/s")
    return int(not all(row["ok"] for row in rows))


def measure(name: str, calls: Pair, device: torch.device, rounds: int, n_texts: int) -> dict[str, Any]:
    """One row: the two results compared, then both timed in turns."""
    wanted, got = (torch.as_tensor(torch.stack(list(calls[who]()))).float() for who in (PEER, OURS))
    error, limit = (got - wanted).abs().max().item(), TOLERANCE * wanted.abs().max().item()
    row: dict[str, Any] = {"workload": name, "name": name, "error": error, "limit": limit, "ok": error <= limit}
    row |= {"ms": {}, "best_peer": None, "speed_up": None, "rate": None, "share": None, "flops": None, "bytes": None}
    if row["ok"]:
        timed = timing.in_turns(calls, device, rounds)
        row["ms"] = {who: vars(t) for who, t in timed.items()}
        row["best_peer"], row["speed_up"] = PEER, timed[PEER].median / timed[OURS].median
        row["rate"] = n_texts / timed[OURS].median * 1e3
    return row


def shown(row: dict[str, Any]) -> str:
    if not row["ok"]:
        return f"{row['workload']:<36}FAILED: differs by {row['error']:.2e}, at most {row['limit']:.2e}"
    ms = {who: t["median"] for who, t in row["ms"].items()}
    times = f"{ms[PEER]:10.1f} ms{ms[OURS]:10.1f} ms"
    return f"{row['workload']:<36}{times}{row['speed_up']:8.2f}x{row['rate']:9.0f} texts/s"
