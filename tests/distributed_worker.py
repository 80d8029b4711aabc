"""One of two processes that train one model together on the CPU; test_training_modes.py starts them.

distributed_worker.py FOLDER RANK: rank 0 writes the gradients it ends up with to FOLDER/ddp.pt and FOLDER/fsdp.pt.
"""

from __future__ import annotations

import os
import pathlib
import sys

import torch
import torch.distributed as dist
from helpers import assert_tier, head_inputs, pair
from test_training import NO_DROPOUT
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

CLS = "BertForTokenClassification"
WORLD = 2


def whole_batch() -> dict[str, torch.Tensor]:
    """Four sequences of ragged lengths, every token with a label."""
    halves = [head_inputs(CLS, labels=True, seed=seed) for seed in (0, 1)]
    return {name: torch.cat([half[name][:2] for half in halves]) for name in halves[0]}


def model() -> torch.nn.Module:
    return pair(CLS, **NO_DROPOUT)[1].train()


def trained(net: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> list[str]:
    """Names of our ops in a forward and backward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        net(**inputs).loss.backward()
    return [e.name.removeprefix("bert_fast::") for e in profiler.events() if e.name.startswith("bert_fast::")]


def main(folder: pathlib.Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    half = {name: x.chunk(WORLD)[rank] for name, x in whole_batch().items()}

    replicated = DistributedDataParallel(model())
    assert_tier(replicated, half, "encoder")
    ops = trained(replicated, half)
    assert ops.count("attention_backward") == 2 and "pack" in ops, ops
    if rank == 0:
        torch.save({n: p.grad for n, p in replicated.module.named_parameters()}, folder / "ddp.pt")

    mesh = torch.distributed.init_device_mesh("cpu", (WORLD,))
    sharded = model()
    for layer in sharded.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    parts = [module for module in sharded.modules() if isinstance(module, FSDPModule)]
    for part in parts:  # as each is while it runs
        part.unshard()
    told = assert_tier(sharded, half, "module", "FSDPBertLayer")
    assert len(told.rows) == 10 and all(how == "fused" for _, how, _ in told.rows[1:]), told
    for part in parts:
        part.reshard()
    ops = trained(sharded, half)
    assert {ops.count(op) for op in ("attention_backward", "linear_gelu_pre", "qkv_linear")} == {2}, ops
    assert ops.count("residual_layer_norm") == 4 and ops.count("embed_layer_norm") == 1, ops
    found = {n: p.grad.full_tensor() for n, p in sharded.named_parameters()}
    if rank == 0:
        torch.save(found, folder / "fsdp.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # all is saved; with threads of torch's still there, an ordinary end now and then aborts
