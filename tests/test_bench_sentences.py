"""`python -m bench sentences`: its texts, its rows, and that it times nothing that is wrong."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import pytest
import torch

from bench import report, sentences
from bench.records import OURS

pytest.importorskip("sentence_transformers")


def test_texts() -> None:
    """The same in every run, with a spread of lengths about the stated median."""
    drawn = sentences.texts(2000)
    assert drawn == sentences.texts(2000) and drawn != sentences.texts(2000, seed=1)
    lengths = [len(text.split()) for text in drawn]
    assert abs(statistics.median(lengths) - sentences.MEDIAN_WORDS) <= 2
    assert min(lengths) >= 1 and max(lengths) > 5 * sentences.MEDIAN_WORDS


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.json"
    assert sentences.run(argparse.Namespace(device="cpu", sentences=12, rounds=1, out=out)) == 0
    record = json.loads(out.read_text())
    assert [row["workload"].split(",")[0] for row in record["rows"]] == ["encode", "module", "pipeline"]
    for row in record["rows"]:
        assert row["ok"] and 0 < row["error"] <= row["limit"] and row["speed_up"] > 0 and row["rate"] > 0
        ms = {name: timed["median"] for name, timed in row["ms"].items()}
        assert row["speed_up"] == pytest.approx(ms[sentences.PEER] / ms[OURS])
    assert capsys.readouterr().out.count("texts/s") == 3
    assert report.run(argparse.Namespace(files=[out], out=tmp_path / "report.html")) == 0
    page = (tmp_path / "report.html").read_text()
    assert "texts/s" in page and (tmp_path / "x-speed-up.png").exists()


def test_a_wrong_result_is_not_timed() -> None:
    timed: list[int] = []

    def theirs() -> list[torch.Tensor]:
        timed.append(1)
        return [torch.ones(3)]

    calls = {sentences.PEER: theirs, OURS: lambda: [torch.ones(3) * 1.01]}
    row = sentences.measure("x", calls, torch.device("cpu"), 2, 1)
    assert not row["ok"] and row["ms"] == {} and len(timed) == 1
    assert "FAILED" in sentences.shown(row)
