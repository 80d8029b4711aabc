"""`bench model --folded --one-launch`: nothing is timed under a form's name that did not run in it; and that one launch
is the default nowhere but where a committed record shows it faster."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bench_cuda
import bench_records as made
import pytest
import torch
from fake_graphs import FakeBackend, backend  # noqa: F401
from test_bench import tiny  # noqa: F401

from bench import model, records, report, timing
from bench.__main__ import main
from bench.records import FOLDED, ONE_LAUNCH, OURS, Record
from bench.workloads import Workload
from bert_fast import direct, one_launch

BOTH = ("--folded", "--one-launch")
WORKS = [Workload("dense", 1, 16), Workload("dense", 3, 16), Workload("dense", 5, 16)]


@pytest.fixture
def works(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(model, "workloads", lambda *args: WORKS)


def bench(tmp_path: Path, *options: str, dtype: str = "bfloat16", code: int = 0) -> dict[str, dict[str, Any]]:
    """workload -> row"""
    out = tmp_path / "record.json"
    command = ["model", "--device", "cpu", "--model", "base", "--dtype", dtype, *options, "--out", str(out)]
    assert main(command) == code
    return {row["workload"]: row for row in json.loads(out.read_text())["rows"]}


@pytest.mark.usefixtures("works")
def test_what_is_asked_for_is_checked_and_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, names in ((), ()), (("--one-launch",), (ONE_LAUNCH,)), (BOTH, (FOLDED, ONE_LAUNCH)):
        rows = bench(tmp_path, *options)
        for row in rows.values():
            taken = {name for name in names if not (name == ONE_LAUNCH and row["rows"] > 64)}
            assert set(row["ms"]) == {"eager", "sdpa", OURS, *taken} and set(row["notes"]) == set(names) - taken
            assert row["best_peer"] in ("eager", "sdpa")
            checks = [v["name"] for v in row["check"]]
            plain = ["last_hidden_state", "pooler_output"]
            assert checks == [*plain, *(f"{n}: {kind}" for n in names if n in taken for kind in plain)]
    assert rows["dense 5x16"]["notes"] == {ONE_LAUNCH: "one launch is not the choice for 5 x 16 rows here"}
    assert "    one launch: one launch is not the choice" in capsys.readouterr().out


@pytest.mark.usefixtures("works")
def test_a_dtype_that_is_not_taken(tmp_path: Path) -> None:
    for row in bench(tmp_path, *BOTH, "--only", "1x16", dtype="float32").values():
        assert set(row["ms"]) == {"eager", "sdpa", OURS}
        assert "for bfloat16" in row["notes"][FOLDED] and "not torch.float32" in row["notes"][ONE_LAUNCH]


@pytest.mark.usefixtures("works")
def test_graphs_decide_what_runs(tmp_path: Path, backend: FakeBackend) -> None:  # noqa: F811
    """Their capacity counts, not the batch; and they are not folded. In one launch there is a graph of its own."""
    rows = bench(tmp_path, *BOTH)
    assert all("CUDA graph is replayed" in row["notes"][FOLDED] for row in rows.values())
    assert ONE_LAUNCH in rows["dense 1x16"]["ms"]
    assert rows["dense 3x16"]["notes"][ONE_LAUNCH] == "one launch is not the choice for 4 x 32 rows here"
    assert backend.captures == 4 and backend.replays > 20


@pytest.mark.usefixtures("works")
def test_a_capture_that_failed(tmp_path: Path, backend: FakeBackend) -> None:  # noqa: F811
    """From then on its calls may be in one launch or not."""
    capture, failed = backend.capture, []

    def fails_once(run: Any, dependent: bool) -> Any:
        if backend.captures == 1 and not failed:
            failed.append(True)
            raise RuntimeError("made up")
        return capture(run, dependent)

    backend.capture = fails_once
    (row,) = bench(tmp_path, "--one-launch", "--only", "1x16").values()
    assert failed and set(row["ms"]) == {"eager", "sdpa", OURS} and "capture of it failed" in row["notes"][ONE_LAUNCH]


@pytest.mark.usefixtures("works")
def test_the_default_is_not_timed_twice(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: FakeBackend,  # noqa: F811
) -> None:
    monkeypatch.setitem(one_launch.MEASURED_ROWS, (0, 0), 32)  # what the CPU says its capability is
    (row,) = bench(tmp_path, "--one-launch", "--only", "1x16").values()
    assert row["notes"] == {ONE_LAUNCH: "the default takes this form itself"} and ONE_LAUNCH not in row["ms"]


@pytest.mark.usefixtures("works")
def test_calls_without_a_graph_are_no_default_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(one_launch.MEASURED_ROWS, (0, 0), 32)
    (row,) = bench(tmp_path, "--one-launch", "--only", "1x16").values()
    assert ONE_LAUNCH in row["ms"] and not row["notes"]


@pytest.mark.usefixtures("works")
def test_nothing_wrong_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = direct.encode_in_one_launch

    def wrong(*args: Any) -> Any:
        encoded = run(*args)
        return dataclasses.replace(encoded, last=encoded.last * 1.1)

    monkeypatch.setattr(direct, "encode_in_one_launch", wrong)
    (row,) = bench(tmp_path, "--one-launch", "--only", "1x16", code=1).values()
    assert not row["ms"] and not row["ok"]
    assert "FAILED: one launch: last_hidden_state" in capsys.readouterr().out


@pytest.mark.usefixtures("works")
def test_memory_that_runs_out_in_a_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not checked is not timed; the default was checked before."""

    def no_memory(*args: Any) -> Any:
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr(direct, "encode_in_one_launch", no_memory)
    (row,) = bench(tmp_path, *BOTH, "--only", "1x16").values()
    assert set(row["ms"]) == {"eager", "sdpa", OURS, FOLDED} and row["ok"]
    assert row["notes"] == {ONE_LAUNCH: "not checked: OutOfMemoryError: made up"}


@pytest.mark.usefixtures("works")
def test_host_and_gpu_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "record.json"
    with bench_cuda.pretended():
        assert main(["model", "--one-launch", "--no-compile", "--only", "dense", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    row, _, large = record["rows"]
    assert set(row["host_ms"]) == set(row["gpu_ms"]) == {OURS, ONE_LAUNCH} and set(large["host_ms"]) == {OURS}
    assert all(ms > 0 for part in ("host_ms", "gpu_ms") for ms in row[part].values())
    assert f"    host / GPU alone: {OURS} {row['host_ms'][OURS]:.3f}" in capsys.readouterr().out
    row["gpu_ms"][ONE_LAUNCH] = None
    table = report.host_table(record)
    assert "one launch<br>GPU ms" in table and f"{row['host_ms'][OURS]:.3f}" in table and "<td>-</td>" in table
    for other in record["rows"]:
        other["host_ms"][OURS] = 0.0
    assert report.host_table(record) == "" == report.host_table(made.model_record())
    with bench_cuda.pretended():
        monkeypatch.setattr(bench_cuda._Event, "query", lambda event: True)
        assert timing.apart(lambda: None, bench_cuda.DEVICE).gpu_ms is None


SIZES = ("base", "minilm")  # whose records an entry needs


def unmeasured(table: dict[tuple[int, int], int], found: Iterable[Record]) -> list[str]:
    """Entries of MEASURED_ROWS that the records do not bear out: of each of SIZES a run on that GPU, in which one
    launch was timed on as many rows and, on these and all fewer, took less time than the default, beyond noise."""

    def bears_out(record: Record, size: str, capability: tuple[int, int], most: int) -> bool:
        if record["kind"] != "model" or record["environment"].get("capability") != "{}.{}".format(*capability):
            return False
        if record["model"] != size or record["dtype"] != "bfloat16":
            return False
        timed = [r for r in record["rows"] if ONE_LAUNCH in r["ms"] and r["batch"] * r["seq"] <= most]
        faster = [r["ok"] and r["ms"][ONE_LAUNCH]["q80"] < r["ms"][OURS]["q20"] for r in timed]
        return all(faster) and any(r["batch"] * r["seq"] == most for r in timed)

    found = list(found)
    return [
        f"{at}: {n} rows"
        for at, n in table.items()
        if not all(any(bears_out(r, size, at, n) for r in found) for size in SIZES)
    ]


def measured(*times: tuple[int, float], size: str = "base") -> Record:
    """A record of the default at 0.2 ms, and of one launch at these (rows, ms)."""
    record = made.model_record() | {"environment": made.ENVIRONMENT | {"capability": "9.0"}}
    record |= {"model": size, "dtype": "bfloat16"}
    row, rows = record["rows"][0], []
    for seq, ms in times:
        rows.append(made.finish(copy.deepcopy(row) | {"batch": 1, "seq": seq}, {"eager": 1.0, OURS: 0.2}))
        rows[-1]["ms"][ONE_LAUNCH] = made.timing(ms)
    return record | {"rows": [*rows, row | {"batch": 1, "seq": 16}]}  # the last one without one launch


def test_what_records_bear_out() -> None:
    small = measured((16, 0.1), (32, 0.1), (48, 0.1), (64, 0.1), (128, 0.1), size="minilm")  # faster throughout
    good, table = measured((32, 0.1), (64, 0.15), (128, 0.9)), {(9, 0): 64}
    assert unmeasured(table, [measured((64, 0.3)), good, small]) == []
    assert unmeasured({(9, 0): 32}, [small, measured((32, 0.1), (64, 0.3))]) == []
    missing = ["(9, 0): 64 rows"]
    for records_of in ([], [good], [small]):
        assert unmeasured(table, records_of) == missing
    assert unmeasured({(9, 0): 128}, [good, small]) == ["(9, 0): 128 rows"]  # slower
    assert unmeasured({(9, 0): 48}, [good, small]) == ["(9, 0): 48 rows"]  # not timed
    assert unmeasured({(9, 0): 16}, [good, small]) == ["(9, 0): 16 rows"]  # the default alone was
    assert unmeasured(table, [small, measured((32, 0.21), (64, 0.1))]) == missing  # slower on fewer rows
    assert unmeasured(table, [small, measured((64, 0.196))]) == missing  # within noise
    assert unmeasured(table, [small, measured((32, 0.1))]) == missing
    assert unmeasured(table | {(8, 0): 64}, [good, small]) == ["(8, 0): 64 rows"]
    # without a GPU there is no capability
    for wrong in ({"kind": "kernels"}, {"environment": made.ENVIRONMENT}, {"dtype": "float16"}, {"model": "large"}):
        assert unmeasured(table, [small, good | wrong]) == missing
    failed = copy.deepcopy(good)
    failed["rows"][1]["ok"] = False
    assert unmeasured(table, [small, failed]) == missing


def test_one_launch_is_the_default_where_it_was_measured() -> None:
    assert unmeasured(one_launch.MEASURED_ROWS, map(records.load, records.RESULTS.glob("*.json"))) == []
    assert all(0 < rows <= one_launch.MAX_ROWS for rows in one_launch.MEASURED_ROWS.values())
