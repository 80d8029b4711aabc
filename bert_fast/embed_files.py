"""The files of `python -m bert_fast embed`: shards out of text, JSON lines and Parquet, and shards put together.

A shard is a fixed number of consecutive rows: JSON objects, or a pyarrow.Table where the input is Parquet.
"""

from __future__ import annotations

import io
import json
import os
import reprlib
import shutil
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

INPUTS = (".txt", ".jsonl", ".parquet")
OUTPUTS = (".jsonl", ".parquet", ".npy")
EMBEDDING = "embedding"

Shard = list[dict[str, Any]] | pa.Table


class EmbedError(Exception):
    """Something the user can put right; the message says how."""


def _short(value: object) -> str:
    return reprlib.repr(value)


# reading


def read_shards(path: Path, column: str, shard_rows: int, skip: Container[int] = ()) -> Iterator[tuple[int, Shard]]:
    """(number, shard) in input order; the numbers in `skip` are passed over without a look at their rows.

    Every shard but the last has `shard_rows` rows; a file without rows is one empty shard. A line of a .txt file is a
    row of one column, empty lines too. Raises EmbedError at the first row whose `column` holds no string.
    """
    if path.suffix == ".parquet":
        for number, table in enumerate(_tables(path, column, shard_rows)):
            if number not in skip:
                if nulls := table[column].null_count:
                    at = table[column].is_null().index(True).as_py() + number * shard_rows
                    raise EmbedError(f"{path}, row {at}: {column!r} is null, expected a string ({nulls} in this shard)")
                yield number, table
        return
    with path.open("rb") as file:
        for number, lines in enumerate(_chunks(file, shard_rows)):
            if number not in skip:
                first = number * shard_rows + 1
                yield number, [_row(path, n, line, column) for n, line in enumerate(lines, first)]


def _chunks(lines: BinaryIO, size: int) -> Iterator[list[bytes]]:
    yield list(islice(lines, size))
    while chunk := list(islice(lines, size)):
        yield chunk


def _row(path: Path, number: int, line: bytes, column: str) -> dict[str, Any]:
    """One line, counted from 1."""
    where, line = f"{path}, line {number}", line.removesuffix(b"\n").removesuffix(b"\r")
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # an editor's byte order mark is no text
    except UnicodeDecodeError as problem:
        raise EmbedError(f"{where}: {_short(line)} is not UTF-8: {problem.reason} at byte {problem.start}") from None
    if path.suffix == ".txt":
        return {column: text}
    try:
        row = json.loads(text)
    except ValueError as problem:
        raise EmbedError(f"{where}: {_short(text)} is not JSON: {problem}") from None
    if not isinstance(row, dict):
        raise EmbedError(f"{where}: {_short(row)}, expected a JSON object with {column!r}")
    if column not in row:
        raise EmbedError(f"{where}: no {column!r}, there are {_short(list(row))}; --column names another")
    if not isinstance(row[column], str):
        raise EmbedError(f"{where}: {column!r} is {_short(row[column])}, expected a string")
    if not row[column].isascii():
        try:
            row[column].encode()
        except UnicodeEncodeError:
            raise EmbedError(f"{where}: {column!r} is {_short(row[column])}, half of a surrogate pair") from None
    if EMBEDDING in row:
        raise EmbedError(f"{where}: there is an {EMBEDDING!r} already")
    return row


def _tables(path: Path, column: str, shard_rows: int) -> Iterator[pa.Table]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as problem:
        raise EmbedError(f"{path}: not a Parquet file: {problem}") from None
    with file:
        schema = file.schema_arrow
        if column not in schema.names:
            raise EmbedError(f"{path}: no column {column!r}, there are {schema.names}; --column names another")
        if EMBEDDING in schema.names:
            raise EmbedError(f"{path}: there is a column {EMBEDDING!r} already")
        kind = schema.field(column).type
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
            raise EmbedError(f"{path}: column {column!r} is of type {kind}, expected string")
        held, first = schema.empty_table(), True
        for batch in file.iter_batches(batch_size=shard_rows):  # ends at row groups, shards do not
            held = pa.concat_tables([held, pa.Table.from_batches([batch])])
            if len(held) >= shard_rows:
                yield held[:shard_rows]
                held, first = held[shard_rows:], False
        if len(held) or first:
            yield held


def count_rows(path: Path, column: str, shard_rows: int, output: Path) -> int:
    """Rows of the input, all of them read once: what could stop a long run at its end shows before its beginning.

    Raises EmbedError for a bad row, and for rows that fit into no common Parquet schema where the output is Parquet.
    """
    rows, schema = 0, None
    for _, shard in read_shards(path, column, shard_rows):
        rows += len(shard)
        if output.suffix == ".parquet":
            schema = _unify([*([schema] if schema else []), _table(shard, column).schema])
    return rows


# writing


@contextmanager
def atomic_file(target: Path, folder: Path) -> Iterator[BinaryIO]:
    """A file that stands under its name whole and on the disk, or not at all; its temporary name is in `folder`."""
    temporary = folder / f"{target.name}.tmp"
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)
    directory = os.open(target.parent, os.O_RDONLY)  # the new name has to reach the disk as well
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def shard_bytes(shard: Shard, column: str, embeddings: np.ndarray, suffix: str) -> bytes:
    """The shard as a file of the output's format: its columns and fp32 `embeddings` (rows, dimension)."""
    buffer = io.BytesIO()
    if suffix == ".npy":
        np.save(buffer, embeddings)
    elif suffix == ".parquet":
        offsets = np.arange(len(shard) + 1, dtype=np.int32) * embeddings.shape[1]
        lists = pa.ListArray.from_arrays(offsets, embeddings.ravel())
        with _parquet_errors():
            pq.write_table(_table(shard, column).append_column(EMBEDDING, lists), buffer)
    else:
        rows = shard.to_pylist() if isinstance(shard, pa.Table) else shard
        for row, vector in zip(rows, embeddings.tolist(), strict=True):
            line = json.dumps({**row, EMBEDDING: vector}, ensure_ascii=False, default=_json_value)
            # the replacement of half a surrogate pair is its escape in JSON
            buffer.write(line.encode("utf-8", "backslashreplace") + b"\n")
    return buffer.getvalue()


def join(parts: Sequence[Path], rows: int, output: Path, folder: Path) -> None:
    """Write OUTPUT out of the files of all its shards, one after the other."""
    with atomic_file(output, folder) as file:
        if output.suffix == ".parquet":
            schema = _unify([pq.read_schema(part) for part in parts])
            with pq.ParquetWriter(file, schema) as writer, _parquet_errors():
                for part in parts:
                    tables = [schema.empty_table(), pq.ParquetFile(part).read()]
                    writer.write_table(pa.concat_tables(tables, promote_options="permissive"))
        elif output.suffix == ".npy":
            dimension = np.load(parts[0], mmap_mode="r").shape[1]
            header = {"descr": "<f4", "fortran_order": False, "shape": (rows, dimension)}
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(np.load(part).tobytes())
        else:
            for part in parts:
                with part.open("rb") as shard:
                    shutil.copyfileobj(shard, file)


def _json_value(value: object) -> str:
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise EmbedError(f"JSON has no {type(value).__name__}, as in {_short(value)}; write to a .parquet file")


def _table(shard: Shard, column: str) -> pa.Table:
    """The shard as a table with the columns of all its rows; a row without one has a null there."""
    if isinstance(shard, pa.Table):
        return shard
    names = dict.fromkeys(name for row in shard for name in row) or {column: None}
    columns = {}
    for name in names:
        with _parquet_errors(f"column {name!r}: "):
            columns[name] = pa.array([row.get(name) for row in shard], pa.string() if name == column else None)
    return pa.table(columns)


def _unify(schemas: Sequence[pa.Schema]) -> pa.Schema:
    with _parquet_errors():
        return pa.unify_schemas(schemas, promote_options="permissive")


@contextmanager
def _parquet_errors(where: str = "") -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as problem:
        message = f"{where}the rows make no Parquet table ({problem}); a .jsonl output takes any row"
        raise EmbedError(message) from problem
