"""The models that are timed: transformers' eager and SDPA, torch.compile in its modes, bert_fast; the same weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import ModuleType

import torch
import transformers

import bert_fast
from bert_fast.demo import minilm_dir

from .records import OURS
from .workloads import SIZES, Workload

GRAPH_ROWS = 8192  # up to here calls are launch-bound and reduce-overhead (CUDA graphs) is worth a try
COMPILE = "compile/"  # prefix of torch.compile's providers, one for each mode
Models = dict[str, torch.nn.Module]


def load(
    size: str, package: ModuleType, work: Workload, device: torch.device, dtype: torch.dtype, **options: object
) -> torch.nn.Module:
    """transformers' or bert_fast's model of the size: the same weights in every class."""
    head, positions = work.model
    cls = package.BertForSequenceClassification if head else package.BertModel
    torch.manual_seed(0)  # also for a classifier that the checkpoint lacks
    if size == "minilm":
        model = cls.from_pretrained(str(minilm_dir()), dtype=dtype, **options)
    else:
        config = transformers.BertConfig(**SIZES[size], max_position_embeddings=positions)
        model = cls._from_config(config, dtype=dtype, **options)
    return model.eval().to(device)


def load_all(size: str, work: Workload, device: torch.device, dtype: torch.dtype) -> Models:
    return {
        "eager": load(size, transformers, work, device, dtype, attn_implementation="eager"),
        "sdpa": load(size, transformers, work, device, dtype, attn_implementation="sdpa"),
        OURS: load(size, bert_fast, work, device, dtype),
    }


def modes(work: Workload, device: torch.device, quick: bool) -> tuple[str, ...]:
    """torch.compile's modes that make sense for a workload, the one that is usually best first."""
    if device.type == "cpu":
        return ("default",)
    small = work.batch * work.seq <= GRAPH_ROWS
    order = ("reduce-overhead", "default", "max-autotune") if small else ("default", "max-autotune")
    return order[:1] if quick else order


def compiled(models: Models, work: Workload, mode: str) -> Callable[..., object]:
    """torch.compile over SDPA, over eager where attentions are asked for (SDPA has none)."""
    with contextlib.suppress(ImportError):  # max-autotune would print a table for every product
        from torch._inductor import select_algorithm

        select_algorithm.PRINT_AUTOTUNE = False
    run = torch.compile(models["eager" if "attentions" in work.outputs else "sdpa"], mode=mode, dynamic=False)

    def call(**kwargs: object) -> object:
        torch.compiler.cudagraph_mark_step_begin()  # the last call's outputs are not held
        return run(**kwargs)

    return call
