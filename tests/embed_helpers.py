"""Shared by the tests of `python -m bert_fast embed`: a small model, its input in each format, a stopped run."""

from __future__ import annotations

import datetime
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from test_cli import WORDS

from bert_fast import embed
from bert_fast.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
ROWS, SHARD = 23, 4  # six shards, the last one of three rows
KEPT = {"id": list(range(ROWS)), "when": [datetime.date(2026, 1, 1 + i) for i in range(ROWS)]}


def sentences(rows: int = ROWS) -> list[str]:
    """Lengths far from sorted; an empty one, and signs of several bytes."""
    words = random.Random(0)
    texts = [" ".join(words.choices(WORDS[5:], k=words.randint(1, 20))) for _ in range(rows)]
    return [*texts[:5], "", "Grüße 你好 \u2028 dog", *texts[7:]]


TEXTS = sentences()


def small_model(folder: Path) -> Iterator[str]:
    """A SentenceTransformer of random weights, large enough that texts differ in their embeddings; while it is in use,
    torch has one thread, as the processes that tests start: the number of threads decides about the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast.from_pretrained(str(folder)).save_pretrained(folder)
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    config = transformers.BertConfig(vocab_size=len(WORDS), initializer_range=0.5, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    whole = folder / "sentence"
    SentenceTransformer(modules=[Transformer(str(folder)), Pooling(32)], device="cpu").save(str(whole))
    yield str(whole)
    torch.set_num_threads(threads)


def write(path: Path, texts: list[str] = TEXTS) -> Path:
    """The texts and the columns KEPT in the format of the name; a .txt has the texts alone."""
    columns = {"text": texts, **{name: values[: len(texts)] for name, values in KEPT.items()}}
    if path.suffix == ".parquet":  # row groups of 5 and 10 rows: their ends are not those of shards
        table = pa.table({**columns, "text": pa.array(texts, pa.string())})
        with pq.ParquetWriter(path, table.schema) as writer:
            for start, rows in ((0, 5), (5, 10), (15, len(texts))):
                writer.write_table(table[start : start + rows])
    elif path.suffix == ".jsonl":
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows))
    else:
        path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def command(source: Path, output: Path, model: str, *options: str) -> list[str]:
    sizes = ["--shard-rows", str(SHARD), "--batch-size", "2"]
    return ["embed", str(source), str(output), "--model", model, "--device", "cpu", *sizes, *options]


def columns_of(path: Path) -> dict[str, list[Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pydict()
    if path.suffix == ".npy":
        return {"embedding": np.load(path).tolist()}
    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    return {name: [row[name] for row in rows] for name in rows[0]}


def assert_embeddings(found: list[list[float]], texts: list[str], model: str, atol: float = 1e-5) -> None:
    """Against SentenceTransformer.encode with transformers' own BertModel."""
    wanted = SentenceTransformer(model, device="cpu").encode(texts)
    assert np.abs(wanted[1:] - wanted[:-1]).max(1).min() > 0.1, "the texts' embeddings hardly differ"
    np.testing.assert_allclose(np.array(found, np.float32), wanted, rtol=0, atol=atol)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the numbers of the shards encoded in this process."""
    numbers: list[int] = []
    original = embed.Embedder.embed

    def spy(self: embed.Embedder, number: int, shard: Any) -> tuple[int, bytes]:
        numbers.append(number)
        return original(self, number, shard)

    monkeypatch.setattr(embed.Embedder, "embed", spy)
    return numbers


def stop_in_third_shard(folder: Path, model: str) -> list[str]:
    """The arguments of a run, in.jsonl to out.jsonl, that stopped there."""
    arguments = command(write(folder / "in.jsonl"), folder / "out.jsonl", model)
    original = embed.Embedder.embed

    def stopping(self: embed.Embedder, number: int, shard: Any) -> tuple[int, bytes]:
        if number == 2:
            raise KeyboardInterrupt
        return original(self, number, shard)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(embed.Embedder, "embed", stopping)
        main(arguments)
    assert sorted(path.name for path in folder.glob("out.jsonl.parts/0*")) == ["00000000.jsonl", "00000001.jsonl"]
    return arguments
