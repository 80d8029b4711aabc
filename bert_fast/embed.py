"""`python -m bert_fast embed`: an embedding for every row of a file, here or on a Ray cluster.

The work is cut into shards of a fixed number of rows. Each is encoded by itself, so that its embeddings do not depend
on what ran before, and becomes a file in OUTPUT.parts, whole or not at all. Whoever comes next, after a kill too, does
the shards that are missing; the last step puts them together.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
import sentence_transformers
import torch
import transformers
from sentence_transformers import SentenceTransformer
from tqdm import tqdm

import bert_fast
from bert_fast.demo import DemoError, minilm_dir
from bert_fast.embed_files import (
    INPUTS,
    OUTPUTS,
    EmbedError,
    Shard,
    atomic_file,
    count_rows,
    join,
    read_shards,
    shard_bytes,
)

# numbered shards -> numbered files, in the order in which they get done
Embed = Callable[[Iterable[tuple[int, Shard]]], Iterator[tuple[int, bytes]]]


@dataclass(frozen=True)
class Recipe:
    """What a shard's embeddings depend on, besides its rows."""

    model: str
    device: str
    dtype: str
    batch_size: int
    normalize: bool
    column: str
    suffix: str  # of the output
    threads: int  # torch's: on a CPU another number adds in another order


class Embedder:
    """A SentenceTransformer on fused kernels, from shard to file; on a cluster, one in each actor."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    @cached_property
    def model(self) -> SentenceTransformer:
        recipe = self.recipe
        torch.set_num_threads(recipe.threads)
        transformers.utils.logging.disable_progress_bar()
        options = {"dtype": getattr(torch, recipe.dtype)}
        try:
            model = SentenceTransformer(recipe.model, device=recipe.device, model_kwargs=options)
        except (OSError, ValueError, RuntimeError) as problem:
            raise EmbedError(f"cannot load {recipe.model!r} on {recipe.device}: {problem}") from problem
        return bert_fast.accelerate(model)

    def load(self) -> None:
        """Fails before the input is read, if at all. Not in __init__: an actor's death would hide the reason."""
        _ = self.model

    def embed(self, number: int, shard: Shard) -> tuple[int, bytes]:
        recipe = self.recipe
        texts = [row[recipe.column] for row in shard] if isinstance(shard, list) else shard[recipe.column].to_pylist()
        vectors = np.empty((0, self.model.get_embedding_dimension()), np.float32)
        if texts:
            options = dict(normalize_embeddings=recipe.normalize, show_progress_bar=False)
            vectors = self.model.encode(texts, batch_size=recipe.batch_size, **options)
        return number, shard_bytes(shard, recipe.column, vectors.astype(np.float32), recipe.suffix)


def run(args: argparse.Namespace) -> int:
    try:
        _check(args)
        _run(args)
    except (EmbedError, DemoError, OSError) as problem:
        reason = getattr(problem, "cause", problem)  # Ray's exceptions have a worker's traceback as their text
        print(f"bert_fast embed: {reason}", file=sys.stderr)
        return 2
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises EmbedError for arguments that do not fit together, before anything is written."""
    source, output = args.input, args.output
    if not source.is_file():
        raise EmbedError(f"there is no file {source}")
    for path, known in ((source, INPUTS), (output, OUTPUTS)):
        if path.suffix not in known:
            raise EmbedError(f"{path}: the name must end in {', '.join(known[:-1])} or {known[-1]}")
    if not output.parent.is_dir():
        raise EmbedError(f"there is no folder {output.parent} for {output.name}")
    if output.exists() and output.samefile(source):
        raise EmbedError(f"{output} is INPUT itself")
    try:
        device = torch.device(args.device or "cpu")
    except RuntimeError as problem:
        raise EmbedError(f"--device {args.device}: {problem}") from None
    if device.type == "cuda" and not args.ray and not torch.cuda.is_available():
        raise EmbedError(f"--device {device}: this torch sees no CUDA device; `python -m bert_fast doctor` says more")
    if not args.ray and (args.ray_address or args.workers):
        raise EmbedError("--ray-address and --workers need --ray")


def _run(args: argparse.Namespace) -> None:
    output: Path = args.output
    recipe = Recipe(
        model=args.model or str(minilm_dir()),
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=args.dtype,
        batch_size=args.batch_size,
        normalize=args.normalize,
        column=args.column,
        suffix=output.suffix,
        threads=torch.get_num_threads(),
    )
    folder = output.with_name(f"{output.name}.parts")
    manifest = folder / "manifest.json"
    with _locked(folder):
        try:
            _work(args, recipe, folder, manifest)
        finally:
            if not manifest.exists():  # done, or stopped before there was anything to keep
                shutil.rmtree(folder, ignore_errors=True)


def _work(args: argparse.Namespace, recipe: Recipe, folder: Path, manifest: Path) -> None:
    source, output, column, shard_rows = args.input, args.output, args.column, args.shard_rows
    identity = _identity(recipe, source, shard_rows)
    known = json.loads(manifest.read_text()) if manifest.exists() and not args.restart else None
    if known:
        _compare(known, identity, folder)
    elif output.exists() and not args.restart:
        raise EmbedError(f"{output} exists; --restart replaces it")
    else:
        _clear(folder, manifest)
    embed = _on_ray(args, recipe) if args.ray else _here(recipe)
    rows = known["rows"] if known else count_rows(source, column, shard_rows, output)
    if not known:
        with atomic_file(manifest, folder) as file:
            file.write(json.dumps({**identity, "rows": rows}, indent=1).encode())
    sizes = [min(shard_rows, rows - start) for start in range(0, rows or 1, shard_rows)]
    parts = [folder / f"{number:08}{output.suffix}" for number in range(len(sizes))]
    done = {number for number, part in enumerate(parts) if part.exists()}
    with tqdm(total=rows, initial=sum(sizes[number] for number in done), unit=" rows") as bar:
        for number, data in embed(read_shards(source, column, shard_rows, skip=done)):
            with atomic_file(parts[number], folder) as file:
                file.write(data)
            bar.update(sizes[number])
    join(parts, rows, output, folder)
    manifest.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The one process that writes to `folder`; the kernel takes the lock back from one that is killed."""
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EmbedError(f"another process is at work in {folder}") from None
        yield


def _clear(folder: Path, manifest: Path) -> None:
    """The manifest goes last: after a kill in between, it still says what the shards are that are left."""
    for file in folder.iterdir():
        if file not in (manifest, folder / "lock"):
            file.unlink()
    manifest.unlink(missing_ok=True)


def _files(path: Path) -> str:
    """Size and latest change of a file, or of all files in a folder."""
    stats = [file.stat() for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return f"{sum(s.st_size for s in stats)} bytes, changed at {max((s.st_mtime_ns for s in stats), default=0)} ns"


def _identity(recipe: Recipe, source: Path, shard_rows: int) -> dict[str, str | int | bool]:
    """What two processes must have in common to work on one output; where they run is no part of it."""
    model = Path(recipe.model)
    device = torch.device(recipe.device).type
    modules = (bert_fast, sentence_transformers, transformers, torch)
    return {
        "input": str(source.resolve()),
        "input's file": _files(source),
        "--model": str(model.resolve()) if model.is_dir() else recipe.model,
        "model's files": _files(model) if model.is_dir() else "by name",
        "--column": recipe.column,
        "--batch-size": recipe.batch_size,
        "--normalize": recipe.normalize,
        "--dtype": recipe.dtype,
        "--device": device,
        "--shard-rows": shard_rows,
        "threads": recipe.threads if device == "cpu" else "of no account",
        **{module.__name__: str(module.__version__) for module in modules},
    }


def _compare(known: dict[str, Any], identity: dict[str, Any], folder: Path) -> None:
    """Raises EmbedError naming what differs from the run that `folder` belongs to."""
    names = [name for name in identity if known.get(name) != identity[name]]
    if names:
        found = "; ".join(f"{name} was {known.get(name)!r}, is {identity[name]!r}" for name in names)
        raise EmbedError(
            f"{folder} belongs to another run: {found}. With the former values it goes on; --restart starts over"
        )


def _here(recipe: Recipe) -> Embed:
    embedder = Embedder(recipe)
    embedder.load()
    return partial(starmap, embedder.embed)


def _on_ray(args: argparse.Namespace, recipe: Recipe) -> Embed:
    """Actors that hold one model each. Rows go to them and files come back, so that they need no common disk."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray.util import ActorPool
    except ModuleNotFoundError:
        raise EmbedError("--ray needs Ray; run: pip install 'bert-fast[ray]'") from None
    if not ray.is_initialized():
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if not args.ray_address:
            quiet["include_dashboard"] = False
        try:
            ray.init(args.ray_address or "local", **quiet)
        except ConnectionError as problem:
            hint = "RAY_AUTH_MODE=token, where it asks for one"
            raise EmbedError(f"no Ray cluster at {args.ray_address}: {problem} ({hint})") from problem
    device = torch.device(recipe.device).type  # Ray shows an actor the GPU that is its own
    gpus, cpus = (1, 1) if device == "cuda" else (0, recipe.threads)
    resource, each = ("GPU", gpus) if gpus else ("CPU", cpus)
    workers = args.workers or int(ray.cluster_resources().get(resource, 0)) // each
    if not workers:
        raise EmbedError(f"no {each} {resource} for a worker in the cluster (--device, OMP_NUM_THREADS)")
    remote = ray.remote(Embedder).options(num_cpus=cpus, num_gpus=gpus, max_restarts=2, max_task_retries=2)
    actors = [remote.remote(replace(recipe, device=device)) for _ in range(workers)]
    ray.get(actors[0].load.remote())

    def embed(shards: Iterable[tuple[int, Shard]]) -> Iterator[tuple[int, bytes]]:
        pool = ActorPool(actors)
        for item in shards:
            finished = None if pool.has_free() else pool.get_next_unordered()
            pool.submit(lambda actor, item: actor.embed.remote(*item), item)
            if finished:
                yield finished
        while pool.has_next():
            yield pool.get_next_unordered()

    return embed
