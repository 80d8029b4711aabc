"""compare on made-up records: verdicts, refusals, exit statuses."""

from __future__ import annotations

import copy
import json

import bench_records as made
import pytest

from bench import compare, records
from bench.__main__ import main
from bench.records import OURS


@pytest.fixture
def two(tmp_path):
    """-> a function: writes a model record and a changed copy of it, returns their paths."""

    def write(change=lambda record: None):
        a, b = made.model_record(), made.model_record()
        change(b)
        return [str(made.write(tmp_path / name, r)) for name, r in (("a.json", a), ("b.json", b))]

    return write


def rows(record):
    return {r["workload"]: r for r in record["rows"]}


@pytest.mark.parametrize(
    "factor, spread, verdict", [(1.1, 0.01, "slower"), (0.9, 0.01, "faster"), (1.1, 0.06, "within noise")]
)
def test_verdicts(factor, spread, verdict):
    a = {"ms": {OURS: made.timing(2.0, spread), "sdpa": made.timing(3.0, spread)}, "best_peer": "sdpa"}
    b = {"ms": {OURS: made.timing(2.0 * factor, spread), "eager": made.timing(3.0, spread)}, "best_peer": "eager"}
    ours = compare.change(a, b, OURS, OURS)
    assert ours.ratio == pytest.approx(factor) and ours.verdict == verdict
    peer = compare.change(a, b, "sdpa", "eager")
    assert (peer.before, peer.after, peer.verdict) == ("sdpa", "eager", "within noise")
    assert compare.change(a, b, OURS, "sdpa") is None and compare.change(a, b, None, None) is None


def test_equal_records_compare_equal(two, capsys):
    assert main(["compare", *two(), "--fail-above", "1.05"]) == 0
    out = capsys.readouterr().out
    assert "dense 32x512" in out and "1.000  within noise" in out and "slower" not in out


def scale_one(record):
    row = rows(record)["dense 1x128"]
    row["ms"][OURS] = made.timing(row["ms"][OURS]["median"] * 1.2)


def test_slower_beyond_the_factor_fails(two, capsys):
    paths = two(scale_one)
    assert main(["compare", *paths]) == 0 and main(["compare", *paths, "--fail-above", "1.25"]) == 0
    capsys.readouterr()
    assert main(["compare", *paths, "--fail-above", "1.05"]) == 1
    assert capsys.readouterr().out.rstrip().endswith("no longer timed: dense 1x128")
    assert main(["compare", *reversed(paths), "--fail-above", "1.05"]) == 0


def test_noise_does_not_fail(two):
    def noisy(record):
        for row in record["rows"]:
            row["ms"][OURS] = made.timing(row["ms"][OURS]["median"] * 1.1, spread=0.2)

    assert main(["compare", *two(noisy), "--fail-above", "1.05"]) == 0


def test_a_workload_that_no_longer_runs_fails(two, capsys):
    def failing(record):
        row = rows(record)["dense 8x128"]
        row["ms"], row["best_peer"] = {}, None

    assert main(["compare", *two(failing), "--fail-above", "2"]) == 1
    assert "not timed" in capsys.readouterr().out


def test_what_only_one_has_is_named(two, capsys):
    def shorter(record):
        record["rows"] = [r for r in record["rows"] if "1x32" not in r["workload"]]

    assert main(["compare", *two(shorter), "--fail-above", "1.05"]) == 0
    assert "only in A: dense 1x32" in capsys.readouterr().out


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("device", "Another GPU", "devices differ: Made-up GPU and Another GPU; --across-devices"),
        ("threads", 7, "devices differ"),
        ("dtype", "float16", "dtype differs"),
        ("model", "large", "model differs"),
        ("kind", "kernels", "kind differs"),
        ("rows", [], "no workload is in both"),
        ("schema", 0, "schema 0, this version reads"),
    ],
)
def test_refusals(two, capsys, field, value, said):
    def changed(record):
        where = copy.deepcopy(record["environment"]) if field in ("device", "threads") else record
        where[field] = value
        if where is not record:
            record["environment"] = where

    paths = two(changed)
    assert main(["compare", *paths]) == 2
    assert said in capsys.readouterr().err
    allowed = field in ("device", "threads")
    assert main(["compare", *paths, "--across-devices"]) == (0 if allowed else 2)


def test_tune_records_and_missing_files_are_refused(tmp_path, two, capsys):
    a = two()[0]
    tune = made.model_record() | {"kind": "tune"}
    b = str(made.write(tmp_path / "t.json", tune))
    assert main(["compare", a, b]) == 2 and "tune record" in capsys.readouterr().err
    assert main(["compare", a, str(tmp_path / "none.json")]) == 2


def test_records_round_trip(tmp_path):
    path = tmp_path / "r.json"
    records.save(path, "model", {"device": "x"}, [{"workload": "a"}], dtype="float32")
    assert records.load(path) == {
        "schema": records.SCHEMA, "kind": "model", "environment": {"device": "x"}, "dtype": "float32",
        "rows": [{"workload": "a"}],
    }  # fmt: skip
    path.write_text(json.dumps([1]))
    with pytest.raises(records.RecordError, match="schema None"):
        records.load(path)
