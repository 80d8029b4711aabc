"""tune: candidates the kernels take, the rule that selects, tables that keep every byte, and the search itself.

The search runs in Triton's interpreter behind a pretended GPU: it compiles, checks and times small problems.
"""

from __future__ import annotations

import dataclasses
import json

import bench_cuda
import pytest
import torch

from bench import timing, tune, tune_space
from bench.__main__ import main
from bench.tune_space import Built, Problem, candidates, keys_of, problem_of
from bench.tune_table import entry_text, replaced
from bert_fast.kernels import configs
from bert_fast.kernels.configs import TileConfig

FILES = sorted(configs.FOLDER.glob("*.json"))
HALF, FP32 = torch.bfloat16, torch.float32
ALL = sorted({key for path in FILES for key in configs.table(path.stem)})


@pytest.mark.parametrize("key", ALL)
def test_every_class_has_a_problem_and_candidates(key):
    problem, present = problem_of(key), configs.table("generic")[key]
    if problem.op == "gemm" and not key.endswith("fp32"):
        assert key == f"gemm/{configs.gemm_class(*problem.sizes)}/half"
    tiles = candidates(key, present, (9, 0), tune.SHARED_DEFAULT)
    assert 5 < len(tiles) == len(set(tiles)) < 200 and present not in tiles
    quick = candidates(key, present, (9, 0), tune.SHARED_DEFAULT, quick=True)
    assert quick and set(quick) < set(tiles)
    grid = tune_space.GRID[problem.op]
    for c in quick:
        assert sum(getattr(c, name) != getattr(present, name) for name in grid) == 1
    for c in tiles:  # what the grid does not name stays
        changed = {f.name for f in dataclasses.fields(c) if getattr(c, f.name) != getattr(present, f.name)}
        assert changed <= set(grid)


def test_candidates_are_for_the_chip():
    key = next(k for k in ALL if k.startswith("gemm/rows>") and k.endswith("wide/half"))
    present = configs.table("generic")[key]
    assert any(c.tma for c in candidates(key, present, (9, 0), 232448))
    old = candidates(key, present, (8, 6), 101376)
    assert old and not any(c.tma for c in old)
    assert all(c.num_stages * (c.BLOCK_M + c.BLOCK_N) * c.BLOCK_K * 2 <= 101376 for c in old)


def test_fields_unknown_to_the_type_are_passed_over(monkeypatch):
    monkeypatch.setitem(tune_space.GRID, "pool", {**tune_space.GRID["pool"], "NEW_FIELD": (1, 2)})
    assert candidates("pool/any/half", configs.table("generic")["pool/any/half"], (9, 0), 232448)


def test_an_unknown_class_is_said():
    with pytest.raises(KeyError, match="gemm/rows<=7 tiny/half: bench/tune_space.py has no problem"):
        problem_of("gemm/rows<=7 tiny/half")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_tables_round_trip(path):
    text = path.read_text()
    entries = {key: TileConfig(**e) for key, e in json.loads(text).items()}
    assert replaced(text, {}) == text
    assert replaced(text, entries) == text  # every entry written anew, byte for byte
    key = next(iter(entries))
    new = dataclasses.replace(entries[key], num_stages=entries[key].num_stages + 1)
    changed = replaced(text, {key: new})
    assert {k: TileConfig(**e) for k, e in json.loads(changed).items()} == entries | {key: new}
    differing = [a for a, b in zip(text.splitlines(), changed.splitlines(), strict=True) if a != b]
    assert len(differing) == 1 and key in differing[0]


def test_new_keys_and_new_tables():
    a, b = (TileConfig(64, 64, 4, n, BLOCK_K=64) for n in (3, 4))
    text = replaced("", {"pool/any/half": a})
    assert text == f'{{\n  "pool/any/half": {entry_text(a)}\n}}\n'
    text = replaced(text, {"gemm/any/fp32": a})
    text = replaced(text, {"pool/other/half": b, "gemm/x/half": b})
    assert list(json.loads(text)) == ["pool/any/half", "pool/other/half", "gemm/any/fp32", "gemm/x/half"]
    assert all(len(line) < 200 for line in text.splitlines())
    assert entry_text(a) == '{"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}'
    with pytest.raises(ValueError, match="not one entry a line"):
        replaced('{\n  "a": {"x":\n 1}\n}\n', {})


def test_selection():
    present, close, better = (TileConfig(64, 64, 4, n) for n in (2, 3, 4))
    assert tune.select({present: 1.0, close: 0.985}, present) == present  # not 2 %
    assert tune.select({present: 1.0, close: 0.98}, present) == close
    assert tune.select({present: 1.0, close: 0.97, better: 0.9}, present) == better
    assert tune.select({close: 9.0}, present) == close  # the present one does not run
    assert tune.select({}, present) == present
    ratios = {TileConfig(64, 64, 4, n): 1 / n for n in range(1, 9)}
    assert [c.num_stages for c in tune.finalists(ratios)] == [8, 7, 6, 5]


def test_dry_run_and_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "--dry-run", "--op", "attention", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "attention/dim<=64/half  16x12x512x64, now {" in out and "candidates for 2 entries" in out
    assert main(["tune"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["tune", "--dry-run", "--only", "nothing"]) == 2


@pytest.fixture
def fake(monkeypatch):
    """A key of a made-up problem whose candidates are functions; time by num_stages, in made-up milliseconds."""
    times = {2: 1.0, 3: 0.9, 4: 0.5, 5: 0.4, 6: 0.95}
    truth = torch.arange(6.0).reshape(2, 3) + 1

    def launch(config, i):
        if config.num_stages == 4:
            return truth + 0.5  # fast and wrong
        if config.num_stages == 5:
            raise RuntimeError("out of resource: shared memory")  # fast and impossible
        out = torch.empty_like(truth)
        if config.num_stages == 7:
            return out  # nothing written
        return out.copy_(truth)

    def in_turns(calls, device, rounds, graph, problems):
        assert graph
        return {name: timing.Timing.of([times[json.loads(name)["num_stages"]]]) for name in calls}

    monkeypatch.setattr(timing, "in_turns", in_turns)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return Built(launch, lambda dtype: truth.to(dtype))


def test_search_drops_what_is_wrong_or_fails(fake):
    tiles = [TileConfig(16, 16, 4, n) for n in range(2, 8)]
    steps = []
    outcome = tune.Search(fake, torch.device("cpu"), FP32).run(tiles[0], tiles[1:], lambda: steps.append(1))
    assert (outcome.tried, outcome.wrong, outcome.failed) == (6, 2, 1) and "shared memory" in outcome.why
    assert {c.num_stages for c in outcome.times} == {2, 3, 6} and len(steps) == 5
    kept = tune.select({c: t.median for c, t in outcome.times.items()}, tiles[0])
    assert kept == tiles[1]
    line = tune.row("pool/any/half", tiles[0], kept, outcome)
    assert line["written"] and line["ms"]["best"]["median"] == 0.9 and line["ms"]["before"]["median"] == 1.0
    assert "now {" in tune.shown(line)


def test_search_where_the_present_entry_does_not_run(fake):
    wrong, slow = TileConfig(16, 16, 4, 4), TileConfig(16, 16, 4, 2)
    outcome = tune.Search(fake, torch.device("cpu"), FP32).run(wrong, [slow], lambda: None)
    assert set(outcome.times) == {slow} and tune.select({slow: 1.0}, wrong) == slow
    assert "now {" in tune.shown(tune.row("pool/any/half", wrong, slow, outcome))


def test_a_lost_context_ends_it(fake, monkeypatch):
    def lost(device=None):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(tune.Broken, match="shared memory"):
        tune.Search(fake, torch.device("cpu"), FP32).run(TileConfig(16, 16, 4, 5), [], lambda: None)


SMALL = {"narrow": (16, 32, 32), "narrow-long": (16, 32, 64), "wide": (16, 64, 32)}
LAUNCHED = [*(f"gemm/rows<=32 {form}/half" for form in SMALL), "attention/dim<=64/half", "attention_probs/dim<=64/half"]


@pytest.mark.interpreter
@pytest.mark.parametrize("key", [*LAUNCHED, "pool/any/half", "gemm/any/fp32"])
def test_problems_launch_and_are_right(key, monkeypatch):
    """The launchers take what `build` gives them, and the references agree."""
    op, shape, kind = key.split("/")
    sizes = SMALL.get(shape.split()[-1], (16, 32, 32)) if op in ("gemm", "pool") else (1, 2, 32, 16)
    monkeypatch.setattr(configs, "NARROW", 32)
    dtype = FP32 if kind == "fp32" else HALF
    search = tune.Search(tune_space.build(Problem(op, sizes), torch.device("cpu"), dtype), torch.device("cpu"), dtype)
    tile = TileConfig(16, 16, 4, 2, BLOCK_K=0 if op.startswith("attention") else 32)
    assert search.right(tile), search.outcome
    if shape.endswith("narrow-long"):
        assert search.right(dataclasses.replace(tile, SPLIT_K=2)), search.outcome


@pytest.mark.interpreter
def test_the_command_writes_table_and_record(tmp_path, monkeypatch, capsys):
    key = "gemm/rows<=32 narrow/half"
    table = tmp_path / "sm90.json"
    table.write_text(text := (configs.FOLDER / "sm90.json").read_text())
    present = configs.table("sm90")[key]
    tiles = [dataclasses.replace(present, BLOCK_M=16, BLOCK_N=16, BLOCK_K=32, SPLIT_K=1, num_stages=n) for n in (2, 3)]
    monkeypatch.setitem(tune_space.PROBLEMS, "gemm/rows<=32 narrow", Problem("gemm", (16, 32, 32)))
    monkeypatch.setattr(tune, "candidates", lambda *args: tiles)
    monkeypatch.setattr(tune, "select", lambda medians, present: tiles[0])  # times here mean nothing
    monkeypatch.setattr(timing, "GRAPH_CALLS", 2)
    monkeypatch.setattr(timing, "BLOCK_MS", {"cuda": 0.0})
    out = tmp_path / "record.json"
    with bench_cuda.pretended():
        command = ["tune", "--only", key, "--out", str(table), "--record", str(out)]
        assert main(command) == 0, capsys.readouterr()
    record = json.loads(out.read_text())
    row = record["rows"][0]
    assert record["kind"] == "tune" and row["workload"] == key
    assert (row["tried"], row["wrong"], row["failed"]) == (3, 0, 0)
    assert table.read_text() == replaced(text, {key: tiles[0]})
    assert main(["report", str(out), "--out", str(tmp_path / "r.html")]) == 0


def test_keys_of_a_table():
    table = configs.table("generic")
    assert set(keys_of(table, tune_space.OPS, HALF)) | set(keys_of(table, tune_space.OPS, FP32)) == set(table)
    assert keys_of(table, ("pool",), HALF) == ["pool/any/half"]
