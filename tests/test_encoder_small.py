"""encoder_small: the CUDA kernel, emulated on the CPU, by the error rule; and that its plan covers all work once."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from emulated import (
    COMPILER,
    NO_COMPILER,
    SHARED_LIMITS,
    Launch,
    Shape,
    encoder_small_emulated,
    plan,
    probabilities,
    stages,
    stores,
)
from kernel_helpers import assert_error_rule, double, randn

from bert_fast.kernels.encoder_small import ACTIVATIONS, encoder_small, encoder_small_ref
from bert_fast.kernels.pack import pack_ref

pytestmark = pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)
BF16, FP16 = torch.bfloat16, torch.float16
QKV, OUT, UP, DOWN = range(4)
A100, H100, GEFORCE = (Launch(shared_limit=SHARED_LIMITS[arch], clusters=arch == 90) for arch in (80, 90, 120))


def parameters(shape: Shape, dtype: torch.dtype) -> list[torch.Tensor]:
    """Scores far from uniform, LayerNorms far from 1 and 0."""
    H, W = shape.hidden, shape.intermediate
    found = []
    for layer in range(shape.layers):
        for i, size in enumerate([(H, H)] * 4 + [(W, H), (H, W)]):
            found.append(randn(*size, dtype=dtype, scale=1.2 * size[1] ** -0.5, seed=100 * layer + i))
        for i, size in enumerate([H, H, H, H, H, H, W, H, H, H]):
            vector = randn(size, scale=0.2, seed=100 * layer + 10 + i)
            found.append((vector + (i in (4, 8))).to(dtype))
    return found


def arguments(shape: Shape, mask: torch.Tensor, skip: bool, dtype: torch.dtype, **changes: Any) -> dict[str, Any]:
    token, cu_seqlens, kv_len, _ = pack_ref(mask, skip)
    return {
        "x": randn(shape.B * shape.S, shape.hidden, dtype=dtype), "token": token, "cu_seqlens": cu_seqlens,
        "kv_len": kv_len, "parameters": parameters(shape, dtype), "eps": [0.1, 0.5] * shape.layers,
        "heads": shape.heads, "scale": (shape.hidden // shape.heads) ** -0.5, "activation": 0, "uniform_empty": True,
        "want_hidden": True, "want_probs": True,
    } | changes  # fmt: skip


def assert_right(args: dict[str, Any], launch: Launch) -> None:
    ours, low = encoder_small_emulated(**args, launch=launch), encoder_small_ref(**args)
    exact = {k: [double(p) for p in v] if k == "parameters" else double(v) for k, v in args.items()}
    for what, *tensors in zip(("last", "hidden", "probs"), ours, low, encoder_small_ref(**exact), strict=True):
        assert_error_rule(*tensors, what)


def mask_of(kind: str, B: int, S: int) -> torch.Tensor:
    at = torch.arange(S).expand(B, S)
    if kind == "left":
        return (at >= torch.arange(B)[:, None] % S).long()
    if kind == "empty":  # every other sequence has no real token
        return (at < S * (torch.arange(B)[:, None] % 2)).long()
    if kind == "holes":
        return ((at * 7 + torch.arange(B)[:, None]) % 3 > 0).long()
    return torch.ones(B, S, dtype=torch.long)


CASES = {
    "one token": (Shape(2, 32, 16, 1, 1, 1), "ones", False, BF16, H100),
    "a slice of one block is empty": (Shape(2, 32, 48, 1, 2, 9), "holes", True, FP16, H100),
    "a group without a tile": (Shape(2, 32, 64, 1, 1, 17), "ones", False, BF16, Launch(blocks=32)),
    "more than a round of tiles": (Shape(1, 384, 384, 6, 2, 24), "left", True, BF16, Launch(blocks=4)),
    "activations in two parts": (Shape(1, 256, 2048, 8, 1, 64), "ones", False, BF16, Launch(128, 61800)),
    "activations in parts, the last one short": (Shape(1, 128, 4080, 4, 1, 60), "ones", False, FP16, GEFORCE),
    "the ring wraps within a unit": (Shape(3, 256, 1024, 4, 1, 33), "ones", False, BF16, Launch(4, 101376)),
    "more heads than blocks": (Shape(2, 256, 64, 8, 5, 7), "left", True, BF16, Launch(blocks=4)),
    "64 sequences of one token": (Shape(1, 64, 64, 2, 64, 1), "ones", False, FP16, A100),
    "empty sequences": (Shape(2, 64, 64, 2, 4, 5), "empty", True, BF16, H100),
    "empty sequences, all rows": (Shape(2, 64, 64, 2, 4, 5), "empty", False, FP16, A100),
    "24 layers": (Shape(24, 32, 48, 1, 1, 16), "ones", False, BF16, A100),
    "head_dim 128": (Shape(2, 256, 128, 2, 3, 20), "left", False, BF16, H100),
    "MiniLM's layer": (Shape(1, 384, 1536, 12, 1, 32), "ones", False, BF16, Launch(blocks=32)),
    "BERT-base's layer": (Shape(1, 768, 3072, 12, 1, 40), "ones", False, FP16, Launch(blocks=32)),
    "BERT-large's layer": (Shape(1, 1024, 4096, 16, 1, 16), "ones", False, BF16, Launch(blocks=128)),
}


@pytest.mark.parametrize("case", CASES)
def test_kernel(case: str) -> None:
    shape, mask, skip, dtype, launch = CASES[case]
    assert_right(arguments(shape, mask_of(mask, shape.B, shape.S), skip, dtype), launch)


@pytest.mark.parametrize("skip", [False, True])
def test_a_batch_in_a_larger_buffer(skip: bool) -> None:
    """That of a CUDA graph: sequences without a row, tokens that no row stands for."""
    shape = Shape(2, 64, 96, 2, 4, 16)
    args = arguments(shape, mask_of("holes", 4, 16), skip, BF16)
    maps = pack_ref(mask_of("holes", 4, 16), skip, torch.tensor([2, 11], dtype=torch.int32))
    args |= dict(zip(("token", "cu_seqlens", "kv_len"), maps, strict=False))
    assert args["cu_seqlens"][-1] <= 22 and not args["cu_seqlens"].diff()[2:].any()
    for launch in (H100, A100):
        assert_right(args, launch)


def test_an_empty_sequence_has_a_context_of_zeros() -> None:
    shape = Shape(2, 64, 64, 2, 4, 5)
    args = arguments(shape, mask_of("empty", 4, 5), True, BF16, uniform_empty=False)
    assert_right(args, H100)
    assert not encoder_small_emulated(**args)[2][:, 0].count_nonzero()


@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)), ids=ACTIVATIONS)
def test_activations(activation: int) -> None:
    shape = Shape(1, 64, 96, 2, 1, 12)
    assert_right(arguments(shape, mask_of("ones", 1, 12), False, BF16, activation=activation), H100)


@pytest.mark.parametrize("want_hidden,want_probs", [(True, False), (False, True), (False, False)])
def test_outputs_on_request(want_hidden: bool, want_probs: bool) -> None:
    shape = Shape(3, 64, 96, 2, 2, 11)
    asked = arguments(shape, mask_of("holes", 2, 11), True, BF16)
    every = encoder_small_emulated(**asked)
    some = encoder_small_emulated(**asked | {"want_hidden": want_hidden, "want_probs": want_probs})
    for all_of_it, got, wanted in zip(every, some, (True, want_hidden, want_probs), strict=True):
        assert torch.equal(got, all_of_it if wanted else all_of_it.new_empty(0))


@pytest.mark.parametrize("seed", range(24))
def test_random_shapes(seed: int) -> None:
    """Rows, padding, layers, sizes, chips and schedules at random."""
    r = random.Random(seed)
    head_dim = r.choice([32, 64, 128])
    heads = r.randint(1, 512 // head_dim)
    B = r.choice([1, 1, 2, 3, 5, 8, 16, 64])
    S = r.randint(1, 64 // B)
    shape = Shape(r.randint(1, 3), heads * head_dim, 16 * r.randint(1, 64), heads, B, S)
    mask = (torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) < r.choice([1.0, 0.8, 0.4, 0.1])).long()
    arch = r.choice([80, 90, 120])
    launch = Launch(r.choice([4, 8, 12, 22, 33]), SHARED_LIMITS[arch], arch == 90, seed)
    flags = {name: r.random() < 0.5 for name in ("uniform_empty", "want_hidden", "want_probs")}
    skip, dtype, activation = r.random() < 0.5, r.choice([BF16, FP16]), r.randint(0, 3)
    assert_right(arguments(shape, mask, skip, dtype, activation=activation, **flags), launch)


def test_same_bits_whatever_the_schedule() -> None:
    """Sums are added in a fixed order; clusters or strips of global memory make no difference either."""
    shape = Shape(2, 128, 256, 2, 2, 13)
    args = arguments(shape, mask_of("holes", 2, 13), True, BF16)
    first, *others = [
        encoder_small_emulated(**args, launch=Launch(12, SHARED_LIMITS[90], clusters, seed))
        for seed in range(4)
        for clusters in (True, False)
    ]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_undefined_rows_reach_nothing() -> None:
    """Rows past the count on the device hold NaN, as the op before leaves them."""
    shape = Shape(2, 64, 96, 2, 3, 9)
    args = arguments(shape, mask_of("left", 3, 9) * torch.tensor([[1], [0], [1]]), True, BF16)
    clean = encoder_small_emulated(**args)
    args["x"][int(args["cu_seqlens"][-1]) :] = float("nan")
    assert all(torch.equal(a, b) for a, b in zip(clean, encoder_small_emulated(**args), strict=True))


def test_opcheck() -> None:
    args = arguments(Shape(2, 32, 48, 1, 2, 5), mask_of("ones", 2, 5), False, torch.float32)
    torch.library.opcheck(encoder_small, tuple(args.values()))


def random_shape(r: random.Random) -> tuple[Shape, Launch]:
    head_dim = r.choice([32, 64, 128])
    heads = r.randint(1, 1024 // head_dim)
    B = r.choice([1, 2, 4, 7, 64])
    shape = Shape(r.randint(1, 3), heads * head_dim, 16 * r.randint(1, 256), heads, B, r.randint(1, 64 // B))
    # three slices of 64 rows, and a ring, must fit; the smallest shared memory holds them up to BERT-base
    archs = [arch for arch in SHARED_LIMITS if arch != 120 or -(-heads // 4) * head_dim <= 192]
    return shape, Launch(r.choice([4, 8, 30, 80, 108, 128, 132, 148, 170]), SHARED_LIMITS[r.choice(archs)])


@pytest.mark.parametrize("part", range(4))
def test_the_plan_covers_everything_once(part: int) -> None:
    """200 random shapes and chips: every weight is multiplied once, every output stored by one block, once."""
    r = random.Random(part)
    for _ in range(50):
        shape, launch = random_shape(r)
        where = f"{shape}, {launch}"
        p = plan(shape, launch)
        assert p["shared_bytes"] <= launch.shared_limit and p["stages"] > p["round"], where
        assert p["blocks"] == 4 * p["groups"] and launch.blocks - 4 < p["blocks"] <= launch.blocks, where
        tiles = torch.tensor([3 * shape.hidden, shape.hidden, shape.intermediate, shape.hidden]) // 16
        steps = torch.tensor([shape.hidden, shape.hidden, shape.hidden, shape.intermediate]) // 16
        work, rows = stages(shape, launch), r.randint(1, shape.B * shape.S)
        assert work[:, 5].min() >= 1 and work[:, 5].max() <= p["unit"], where
        for layer in range(shape.layers):
            for product in range(4):
                mine = work[(work[:, 1] == layer) & (work[:, 2] == product)]
                done = torch.zeros(tiles[product], steps[product] + 1, dtype=torch.int32)  # +1 and -1 at the ends
                ones = torch.ones(len(mine), dtype=torch.int32)
                done.index_put_((mine[:, 3], mine[:, 4]), ones, accumulate=True)
                done.index_put_((mine[:, 3], mine[:, 4] + mine[:, 5]), -ones, accumulate=True)
                assert (done.cumsum(1)[:, :-1] == 1).all(), where
        place = torch.cat([torch.zeros(1, dtype=torch.long), tiles.cumsum(0)])
        found = stores(shape, launch, rows)
        slot = (found[:, 1] * place[4] + place[found[:, 2]] + found[:, 3]) * rows + found[:, 4]
        assert (found[:, 3] < tiles[found[:, 2]]).all(), where
        assert (torch.bincount(slot, minlength=shape.layers * int(place[4]) * rows) == 1).all(), where
        maps = probabilities(shape, launch)
        assert (maps[:, 1] * shape.heads + maps[:, 2]).sort().values.tolist() == list(range(shape.layers * shape.heads))
        # those who multiply a tile are the group that stores it
        group = torch.full((shape.layers, 4, int(tiles.max())), -1)
        group[found[:, 1], found[:, 2], found[:, 3]] = found[:, 0] // 4
        assert (group[work[:, 1], work[:, 2], work[:, 3]] == work[:, 0] // 4).all(), where


def test_weights_are_streamed_evenly() -> None:
    """BERT-base on 132 multiprocessors: no block is far ahead of its share after any layer, nor at the end."""
    shape, launch = Shape(12, 768, 3072, 12, 1, 32), Launch(blocks=132)
    work = stages(shape, launch)
    for layer, most in enumerate([1.15] * 11 + [1.02]):
        done = work[work[:, 1] <= layer]
        steps_of = torch.bincount(done[:, 0], weights=done[:, 5].double())
        assert steps_of.max() <= most * steps_of.mean(), f"after layer {layer}"
    found = plan(shape, launch)
    assert found["round"] == 6 and found["x_units"] == 4  # whole hands, all activations
    assert found["stages"] * found["unit"] > (work[work[:, 0] == 0][:, 5]).sum() / shape.layers  # more than a layer


def test_the_ring_comes_before_the_activations() -> None:
    shape, _, _, _, launch = CASES["activations in two parts"]
    found = plan(shape, launch)
    assert found["x_units"] * 2 * found["unit"] == shape.intermediate // 16 // 4
    assert found["stages"] == 2 * found["round"]


def test_there_is_no_plan() -> None:
    shape = Shape(1, 1024, 4096, 8, 1, 64)
    with pytest.raises(RuntimeError, match="fewer blocks fit the device than one group has"):
        plan(shape, Launch(blocks=3))
    with pytest.raises(RuntimeError, match="shared memory is too small"):
        plan(shape, Launch(shared_limit=SHARED_LIMITS[120]))
    assert plan(shape, Launch(132))["round"] == 8
