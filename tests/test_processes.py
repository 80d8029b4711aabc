"""Accelerated models in worker processes, forked and spawned."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import assert_close_fp32, model_inputs
from thread_helpers import accelerated
from torch.utils.data import DataLoader, Dataset

import bert_fast


class Computes(Dataset[Any]):
    """Items and batches that an accelerated model makes."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    @torch.no_grad()
    def __getitem__(self, i: int) -> torch.Tensor:
        return self.model(**model_inputs(2, 5 + i, "right", i)).logits

    @torch.no_grad()
    def collate(self, items: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack(items), self.model(**model_inputs(len(items), 7)).logits


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_data_loader(method: str) -> None:
    upstream, model = accelerated()
    batches = []
    for each in (upstream, model):
        data = Computes(each)
        data[0]  # what the parent has computed goes along
        workers = {} if each is upstream else {"num_workers": 2, "multiprocessing_context": method}
        batches.append(list(DataLoader(data, batch_size=2, collate_fn=data.collate, **workers)))
    assert_close_fp32(batches[1], batches[0])
    assert_close_fp32(model(**model_inputs()), upstream(**model_inputs()))


@torch.no_grad()
def load_and_run(source: Any, padding: str) -> Any:
    """In a process of its own: a folder, or the model itself, which arrives as transformers' own."""
    if isinstance(source, Path):
        model = bert_fast.BertForSequenceClassification.from_pretrained(source, padding=padding).eval()
    else:
        assert type(source) is transformers.BertForSequenceClassification
        model = bert_fast.accelerate(source, padding=padding)
    return model(**model_inputs(kind="right")).logits.numpy(), model.padding


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    upstream, model = accelerated()
    upstream.save_pretrained(tmp_path)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.starmap(load_and_run, [(tmp_path, "skip"), (model, "exact")], chunksize=1)
    assert [padding for _, padding in found] == ["skip", "exact"]
    for logits, _ in found:
        assert_close_fp32(torch.from_numpy(logits), upstream(**model_inputs(kind="right")).logits)
