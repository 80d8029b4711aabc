"""`python -m bert_fast embed --ray` on a local Ray of two CPUs, and the Ray Data recipe of docs/embedding.md."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sentence_transformers")
pytest.importorskip("pyarrow")

pytest.importorskip("ray")

import pyarrow as pa
import pyarrow.parquet as pq
from embed_helpers import ROOT, TEXTS, assert_embeddings, command, small_model, stop_in_third_shard, watch, write

from bert_fast.__main__ import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return watch(monkeypatch)


@pytest.fixture
def unfinished(tmp_path: Path, model: str) -> list[str]:
    return stop_in_third_shard(tmp_path, model)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


def test_ray_goes_on_where_a_local_run_stopped(
    cluster: Any, unfinished: list[str], tmp_path: Path, model: str, encoded: list[int]
) -> None:
    """Two workers, four shards left; the whole equals an undisturbed local run."""
    undisturbed = tmp_path / "undisturbed.jsonl"
    assert main(command(tmp_path / "in.jsonl", undisturbed, model)) == 0
    encoded.clear()
    assert main([*unfinished, "--ray"]) == 0
    assert not encoded, "the work was done here"
    assert (tmp_path / "out.jsonl").read_bytes() == undisturbed.read_bytes()


def test_a_bad_shard_on_ray(cluster: Any, tmp_path: Path, model: str, capsys) -> None:
    """A run begun on Ray; a worker's error reads as it does here, without the worker's traceback."""
    pq.write_table(pa.table({"text": ["a"], "raw": [b"0"]}), tmp_path / "in.parquet")
    assert main(command(tmp_path / "in.parquet", tmp_path / "out.jsonl", model, "--ray", "--workers", "1")) == 2
    assert re.search("^bert_fast embed: JSON has no bytes", capsys.readouterr().err, re.MULTILINE)


def test_recipe_of_the_docs(cluster: Any, tmp_path: Path, model: str) -> None:
    """The pipeline as it stands there, but for its paths and the GPU."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/embedding.md").read_text(), re.DOTALL)
    (recipe,) = (block for block in blocks if "map_batches" in block)
    source = write(tmp_path / "in.parquet")
    changes = {"texts.parquet": source, "embeddings": tmp_path / "out", "sentence-transformers/all-MiniLM-L6-v2": model}
    for name, value in changes.items():
        assert f'"{name}"' in recipe
        recipe = recipe.replace(f'"{name}"', repr(str(value)))
    assert "num_gpus=1" in recipe
    cluster.data.DataContext.get_current().enable_progress_bars = False
    exec(recipe.replace("num_gpus=1", "num_cpus=0.5"), {"__name__": "recipe"})
    table = pq.read_table(tmp_path / "out").sort_by("id")
    assert table["text"].to_pylist() == TEXTS
    assert_embeddings(table["embedding"].to_pylist(), TEXTS, model)
