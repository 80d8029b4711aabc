"""`python -m bert_fast embed` after a kill: nothing is lost, repeated or mixed with another run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers")
pytest.importorskip("pyarrow")

from embed_helpers import (
    ROOT,
    ROWS,
    SHARD,
    TEXTS,
    assert_embeddings,
    command,
    small_model,
    stop_in_third_shard,
    watch,
    write,
)

from bert_fast.__main__ import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return watch(monkeypatch)


@pytest.fixture
def unfinished(tmp_path: Path, model: str) -> list[str]:
    return stop_in_third_shard(tmp_path, model)


KILLS = {  # point -> the shards that the next process still has to do, None where OUTPUT is finished
    "before manifest": [0, 1, 2, 3, 4, 5],
    "torn 00000002": [2, 3, 4, 5],
    "before 00000002": [2, 3, 4, 5],
    "after 00000002": [3, 4, 5],
    "torn out": [],
    "after out": [],
    "cleaning": None,
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """A folder with an input of each format, and in FORMAT-POINT what is left of a killed run."""
    folder = tmp_path_factory.mktemp("killed")
    cases = []
    for source, target in ((".jsonl", ".parquet"), (".parquet", ".jsonl"), (".txt", ".npy")):
        write(folder / f"in{source}")
        for point in KILLS:
            output = folder / f"{source[1:]}-{point}" / f"out{target}"
            output.parent.mkdir()
            cases.append([point, command(folder / f"in{source}", output, model)])
    script = [sys.executable, str(ROOT / "tests/embed_killed.py"), json.dumps(cases)]
    done = subprocess.run(script, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == [-signal.SIGKILL] * len(cases), done.stderr[-3000:]
    return folder


def environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.parametrize("point", KILLS)
@pytest.mark.parametrize("source,target", [(".jsonl", ".parquet"), (".parquet", ".jsonl"), (".txt", ".npy")])
def test_restart_equals_an_undisturbed_run(
    source: str, target: str, point: str, killed: Path, tmp_path: Path, model: str, encoded: list[int], capsys
) -> None:
    undisturbed, output = tmp_path / f"out{target}", killed / f"{source[1:]}-{point}" / f"out{target}"
    assert main(command(killed / f"in{source}", undisturbed, model)) == 0
    encoded.clear()
    status = main(command(killed / f"in{source}", output, model))
    if KILLS[point] is None:
        assert status == 2 and "exists; --restart replaces it" in capsys.readouterr().err
    else:
        assert status == 0 and encoded == KILLS[point]
    assert output.read_bytes() == undisturbed.read_bytes()
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_kill_from_outside_and_the_lock(tmp_path: Path, model: str, encoded: list[int], capsys) -> None:
    """Two processes on one output: the second is told so; after kill -9 of the first it goes on."""
    source, output = write(tmp_path / "in.txt", TEXTS * 10), tmp_path / "out.npy"
    arguments = command(source, output, model, "--shard-rows", "1")
    first = subprocess.Popen([sys.executable, "-m", "bert_fast", *arguments], env=environment(), stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out.npy.parts/0000000[3-9].npy")):
            assert first.poll() is None and time.monotonic() < deadline, "it wrote no shards"
            time.sleep(0.001)
        assert main(arguments) == 2
        assert f"another process is at work in {output}.parts" in capsys.readouterr().err
    finally:
        first.kill()
        first.communicate()
    assert first.returncode == -signal.SIGKILL and not output.exists()
    before = len(list(tmp_path.glob("out.npy.parts/*.npy")))
    assert 4 <= before < 10 * ROWS
    assert main(arguments) == 0
    assert encoded == list(range(before, 10 * ROWS))
    assert_embeddings(np.load(output).tolist(), TEXTS * 10, model)


@pytest.mark.parametrize(
    "options,named",
    [
        (["--batch-size", "3"], "--batch-size was 2, is 3"),
        (["--shard-rows", "5"], "--shard-rows was 4, is 5"),
        (["--normalize"], "--normalize was False, is True"),
        (["--dtype", "float16"], "--dtype was 'float32', is 'float16'"),
        (["--column", "id"], "--column was 'text', is 'id'"),
        (["--device", "meta"], "--device was 'cpu', is 'meta'"),
        (["--model", "other"], "--model was '.*', is 'other'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_other_options_are_refused(options: list[str], named: str, unfinished: list[str], capsys) -> None:
    parts = sorted(Path(f"{unfinished[2]}.parts").iterdir())
    assert main([*unfinished, *options]) == 2
    said = capsys.readouterr().err
    assert re.search(named, said) and "--restart starts over" in said
    assert sorted(Path(f"{unfinished[2]}.parts").iterdir()) == parts


def test_another_input_version_or_number_of_threads_is_refused(
    unfinished: list[str], tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "0.1")
    assert main(unfinished) == 2
    assert re.search("torch was '.*', is '0.1'", capsys.readouterr().err)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert main(unfinished) == 2
    assert re.search("threads was [0-9]+, is 77", capsys.readouterr().err)
    monkeypatch.undo()
    os.utime(tmp_path / "in.jsonl", ns=(1, 1))
    assert main(unfinished) == 2
    assert re.search("input's file was '.*', is '.* changed at 1 ns'", capsys.readouterr().err)


def test_restart_starts_over(unfinished: list[str], tmp_path: Path, model: str, encoded: list[int]) -> None:
    assert main([*unfinished, "--normalize", "--restart"]) == 0
    assert encoded == [0, 1, 2, 3, 4, 5]
    undisturbed = tmp_path / "undisturbed.jsonl"
    assert main(command(tmp_path / "in.jsonl", undisturbed, model, "--normalize")) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == undisturbed.read_bytes()


def test_a_finished_output_is_replaced_only_by_restart(tmp_path: Path, model: str, encoded: list[int], capsys) -> None:
    arguments = command(write(tmp_path / "in.txt"), tmp_path / "out.npy", model)
    assert main(arguments) == 0
    encoded.clear()
    (tmp_path / "out.npy").write_text("precious")
    assert main(arguments) == 2
    assert "out.npy exists; --restart replaces it" in capsys.readouterr().err
    assert (tmp_path / "out.npy").read_text() == "precious" and not encoded
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.npy"]
    assert main([*arguments, "--restart"]) == 0
    assert_embeddings(np.load(tmp_path / "out.npy").tolist(), TEXTS, model)


def test_shards_without_a_manifest_are_nobodys(tmp_path: Path, model: str, encoded: list[int]) -> None:
    """As a kill between the manifest's removal and the shards' leaves them."""
    parts = tmp_path / "out.npy.parts"
    parts.mkdir()
    np.save(parts / "00000000.npy", np.zeros((SHARD, 32), np.float32))
    assert main(command(write(tmp_path / "in.txt"), tmp_path / "out.npy", model)) == 0
    assert encoded == [0, 1, 2, 3, 4, 5]
