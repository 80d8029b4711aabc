"""`python -m bert_fast embed`: what it writes in each format, and what it refuses."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cli import has_minilm

pytest.importorskip("sentence_transformers")
pytest.importorskip("pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq
from embed_helpers import KEPT, ROWS, TEXTS, assert_embeddings, columns_of, command, small_model, watch, write

import bert_fast
from bert_fast import demo, embed
from bert_fast.__main__ import main
from bert_fast.embed_files import EmbedError, read_shards


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return watch(monkeypatch)


@pytest.mark.parametrize("target", [".jsonl", ".parquet", ".npy"])
@pytest.mark.parametrize("source", [".txt", ".jsonl", ".parquet"])
def test_every_format(source: str, target: str, tmp_path: Path, model: str, encoded: list[int], capsys) -> None:
    output = tmp_path / f"out{target}"
    assert main(command(write(tmp_path / f"in{source}"), output, model)) == 0
    assert encoded == [0, 1, 2, 3, 4, 5]
    assert f"{ROWS}/{ROWS}" in capsys.readouterr().err
    found = columns_of(output)
    assert_embeddings(found.pop("embedding"), TEXTS, model)
    if target == ".npy":
        assert np.load(output).dtype == np.float32 and not found
        return
    kept = {} if source == ".txt" else dict(KEPT)
    if source == ".jsonl" or target == ".jsonl":
        kept |= {"when": [str(day) for day in KEPT["when"]]} if kept else {}
    assert found == {"text": TEXTS, **kept}
    if target == ".parquet":
        assert pq.read_schema(output).field("embedding").type.value_type == pa.float32()
    assert not output.with_name(f"{output.name}.parts").exists()


def test_options(tmp_path: Path, model: str) -> None:
    source = write(tmp_path / "in.txt")
    plain, unit, half = (tmp_path / f"{name}.npy" for name in ("plain", "unit", "half"))
    for output, options in ((plain, []), (unit, ["--normalize"]), (half, ["--dtype", "float16"])):
        assert main(command(source, output, model, *options)) == 0
    lengths = np.linalg.norm(np.load(plain), axis=1, keepdims=True)
    assert np.abs(lengths - 1).max() > 0.1
    np.testing.assert_allclose(np.load(unit), np.load(plain) / lengths, atol=1e-6)
    assert 1e-5 < np.abs(np.load(half) - np.load(plain)).max() < 0.05
    assert np.load(half).dtype == np.float32
    other = tmp_path / "in.jsonl"
    other.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    assert main(command(other, tmp_path / "body.npy", model, "--column", "body")) == 0
    assert (tmp_path / "body.npy").read_bytes() == plain.read_bytes()


@pytest.mark.skipif(not has_minilm(), reason=demo.WEIGHTS_INSTALL)
def test_real_weights_are_the_default(tmp_path: Path) -> None:
    output = tmp_path / "out.npy"
    assert main(["embed", str(write(tmp_path / "in.txt", TEXTS[:8])), str(output), "--device", "cpu"]) == 0
    assert_embeddings(np.load(output).tolist(), TEXTS[:8], str(demo.minilm_dir()), atol=1e-6)


def test_the_model_is_fused(model: str) -> None:
    embedder = embed.Embedder(
        embed.Recipe(model, "cpu", "float32", 2, False, "text", ".npy", threads=torch.get_num_threads())
    )
    assert any(isinstance(module, bert_fast.BertModel) for module in embedder.model.modules())


@pytest.mark.parametrize("source", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("target", [".jsonl", ".parquet", ".npy"])
def test_no_rows(source: str, target: str, tmp_path: Path, model: str) -> None:
    output = tmp_path / f"out{target}"
    assert main(command(write(tmp_path / f"in{source}", []), output, model)) == 0
    if target == ".parquet":
        table = pq.read_table(output)
        assert len(table) == 0 and {"text", "embedding"} <= set(table.column_names)
    else:
        assert output.read_bytes() == b"" if target == ".jsonl" else np.load(output).shape == (0, 32)


def test_lines_that_editors_and_windows_write(tmp_path: Path) -> None:
    """A byte order mark and carriage returns are no text; the last line may lack its end; U+2028 ends none."""
    (tmp_path / "in.txt").write_bytes("\ufeffone\r\n\r\n\ufefftwo\u2028\nlast".encode())
    shards = list(read_shards(tmp_path / "in.txt", "text", 3))
    assert shards == [(0, [{"text": t} for t in ("one", "", "\ufefftwo\u2028")]), (1, [{"text": "last"}])]


def test_columns_that_only_some_rows_have(tmp_path: Path, model: str) -> None:
    """A Parquet file has one schema, whichever shards saw a column, an integer or a fraction; JSON keeps its rows."""
    rows: list[dict[str, Any]] = [{"text": text} for text in TEXTS[:10]]
    rows[1] |= {"n": 1, "list": []}
    rows[6] |= {"n": 1.5, "list": [1]}
    rows[9] |= {"late": {"deep": "yes"}}
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(command(source, tmp_path / "out.parquet", model)) == 0
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["n"].to_pylist() == [None, 1.0, *[None] * 4, 1.5, *[None] * 3]
    assert table["list"][6].as_py() == [1] and table["late"][9].as_py() == {"deep": "yes"}
    assert main(command(source, tmp_path / "out.jsonl", model)) == 0
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    assert [row.pop("embedding") and row for row in found] == rows


def test_json_that_is_no_unicode(tmp_path: Path, model: str) -> None:
    """Half a surrogate pair in another column stays what it was, in a file that is UTF-8."""
    (tmp_path / "in.jsonl").write_text('{"text": "hello", "cut": "\\ud83d", "whole": "\\ud83d\\ude00"}\n')
    assert main(command(tmp_path / "in.jsonl", tmp_path / "out.jsonl", model)) == 0
    row = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    assert (row["cut"], row["whole"]) == ("\ud83d", "\U0001f600")


def test_reading_is_lazy(tmp_path: Path) -> None:
    """Of a long file one shard is held; one that is done is not even parsed."""
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n' * 4 + "not JSON\n" * 4 + '{"text": "b"}\n')
    shards = read_shards(tmp_path / "in.jsonl", "text", 4)
    assert next(shards)[0] == 0
    with pytest.raises(EmbedError, match="line 5"):
        next(shards)
    assert [number for number, _ in read_shards(tmp_path / "in.jsonl", "text", 4, skip={1})] == [0, 2]


# what it refuses


GOOD = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    "name,content,said",
    [
        ("in.jsonl", GOOD * 5 + b"{oops}\n", r"in.jsonl, line 6: '\{oops\}' is not JSON: Expecting"),
        ("in.jsonl", GOOD * 5 + b"\n", r"in.jsonl, line 6: '' is not JSON"),
        ("in.jsonl", GOOD + b"[1]\n", r"in.jsonl, line 2: \[1\], expected a JSON object with 'text'"),
        ("in.jsonl", GOOD + b'{"body": 1}\n', r"in.jsonl, line 2: no 'text', there are \['body'\]; --column"),
        ("in.jsonl", GOOD + b'{"text": null}\n', r"in.jsonl, line 2: 'text' is None, expected a string"),
        ("in.jsonl", GOOD + b'{"text": 7}\n', r"in.jsonl, line 2: 'text' is 7, expected a string"),
        ("in.jsonl", b'{"text": "\\ud83d"}\n', r"in.jsonl, line 1: 'text' is '\\ud83d', half of a surrogate pair"),
        ("in.jsonl", b'{"text": "a", "embedding": 1}\n', r"in.jsonl, line 1: there is an 'embedding' already"),
        ("in.txt", b"fine\n\xff\n", r"in.txt, line 2: b'\\xff' is not UTF-8: invalid start byte at byte 0"),
        ("in.parquet", b"PAR?", r"in.parquet: not a Parquet file"),
        ("in.parquet", {"body": ["a"]}, r"in.parquet: no column 'text', there are \['body'\]; --column"),
        ("in.parquet", {"text": [1]}, r"in.parquet: column 'text' is of type int64, expected string"),
        ("in.parquet", {"text": ["a"] * 6 + [None]}, r"in.parquet, row 6: 'text' is null, expected a string"),
        ("in.parquet", {"text": ["a"], "embedding": [1]}, r"in.parquet: there is a column 'embedding' already"),
        ("in.csv", b"text\n", r"in.csv: the name must end in .txt, .jsonl or .parquet"),
        ("in.txt", None, r"there is no file .*in.txt"),
    ],
)
def test_bad_input(name: str, content: Any, said: str, tmp_path: Path, model: str, encoded: list[int], capsys) -> None:
    """One line that says where, what and what was expected; nothing is embedded and nothing is left behind."""
    if isinstance(content, dict):
        pq.write_table(pa.table(content), tmp_path / name)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(command(tmp_path / name, tmp_path / "out.jsonl", model)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert re.search("^bert_fast embed: .*" + said, lines[-1]) and len(lines) == 1
    assert not encoded and [path.name for path in tmp_path.iterdir()] == [name][: content is not None]


@pytest.mark.parametrize(
    "output,options,said",
    [
        ("out.csv", [], "out.csv: the name must end in .jsonl, .parquet or .npy"),
        ("nowhere/out.npy", [], "there is no folder .*nowhere for out.npy"),
        ("in.jsonl", ["--restart"], "in.jsonl is INPUT itself"),
        ("out.npy", ["--workers", "2"], "--ray-address and --workers need --ray"),
        ("out.npy", ["--device", "gpu"], "--device gpu: Expected one of cpu, cuda"),
        ("out.npy", ["--device", "cuda:1"], "--device cuda:1: this torch sees no CUDA device"),
        ("out.npy", ["--model", "no/where"], "cannot load 'no/where' on cpu"),
        ("out.parquet", [], "column 'n': the rows make no Parquet table .*; a .jsonl output takes any row"),
    ],
)
def test_bad_arguments(
    output: str, options: list[str], said: str, tmp_path: Path, model: str, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a", "n": 1}\n{"text": "a", "n": "one"}\n')
    assert main(command(source, tmp_path / output, model, *options)) == 2
    assert re.search(said, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_types_that_json_lacks(tmp_path: Path, model: str, capsys) -> None:
    pq.write_table(pa.table({"text": ["a"], "raw": [b"\x00"]}), tmp_path / "in.parquet")
    assert main(command(tmp_path / "in.parquet", tmp_path / "out.jsonl", model)) == 2
    assert r"JSON has no bytes, as in b'\x00'; write to a .parquet file" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "-1"])
def test_sizes_are_positive(number: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["embed", "a.txt", "b.npy", "--batch-size", number])
    assert f"--batch-size: {number}, expected 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["sentence_transformers", "pyarrow", "tqdm"])
def test_a_missing_extra(module: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delattr(bert_fast, "embed")
    for ours in ("bert_fast.embed", "bert_fast.embed_files"):
        monkeypatch.delitem(sys.modules, ours)
    assert main(["embed", "a.txt", "b.npy"]) == 2
    assert capsys.readouterr().err == f"bert_fast embed: {module} is missing; run: pip install 'bert-fast[embed]'\n"


def test_ray_missing(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(command(write(tmp_path / "in.txt"), tmp_path / "out.npy", model, "--ray")) == 2
    assert "pip install 'bert-fast[ray]'" in capsys.readouterr().err
