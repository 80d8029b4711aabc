"""CUDA graphs without CUDA: what a replay returns, and when there is none; through fake_graphs.py's stand-in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_graphs import FakeBackend, alive, assert_equal, backend, directly, inference, with_empty  # noqa: F401
from helpers import (
    FIRST_TOKEN_HEADS,
    MASK_KINDS,
    assert_close_fp32,
    head_inputs,
    model_inputs,
    pair,
    ragged_mask,
    random_ids,
    tensors_of,
)
from torch.utils._python_dispatch import TorchDispatchMode

import bert_fast
from bert_fast import snapshot

pytestmark = pytest.mark.usefixtures("backend", "inference")
FLAGS = {"output_hidden_states": True, "output_attentions": True}
WIDE = {"max_position_embeddings": 64}  # so that a bucket is a whole one of 32 positions


@pytest.mark.parametrize("flags", [{}, {"output_hidden_states": True}, {"output_attentions": True}, FLAGS])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["exact", "skip"])
def test_outputs(padding: str, attn: str, flags: dict[str, bool], backend: FakeBackend) -> None:  # noqa: F811
    """Every kind of mask, sequences without a real token too: what launching directly gives, and transformers."""
    upstream, ours = pair(attn=attn, **WIDE)
    ours.set_padding(padding)
    masks = {kind: ragged_mask(3, 11, kind) for kind in MASK_KINDS}
    masks |= {f"{kind}, one empty": with_empty(ragged_mask(3, 11, kind, 1)) for kind in ("right", "holes")}
    for mask in (None, *masks.values()):
        inputs = {"input_ids": random_ids(3, 11), "attention_mask": mask, **flags}
        for _ in range(3):
            got = ours(**inputs)
        assert_close_fp32(got, directly(ours, **inputs))
        if padding == "exact" and not (attn == "sdpa" and "output_attentions" in flags):
            assert_close_fp32(got, upstream(**inputs), factor=2e-5)
        assert not flags.get("output_hidden_states") or got.hidden_states[-1] is got.last_hidden_state
        assert all(x.is_contiguous() for x in tensors_of(got).values())
    assert alive(ours) == 2 and backend.captures == 2  # with a mask and without
    assert backend.replays == 3 * 8 - 2  # all calls but each bucket's first


@pytest.mark.parametrize("padding", ["exact", "skip"])
@pytest.mark.parametrize("kind", [None, *MASK_KINDS])
def test_a_full_bucket_is_bit_equal(kind: str | None, padding: str, backend: FakeBackend) -> None:  # noqa: F811
    _, ours = pair(**WIDE)
    ours.set_padding(padding)
    inputs = model_inputs(4, 32, kind, **FLAGS)
    for _ in range(2):
        got = ours(**inputs)
    assert backend.replays == 1
    assert_equal(got, directly(ours, **inputs))


@pytest.mark.parametrize("padding", ["exact", "skip", "auto"])
@pytest.mark.parametrize("cls", ["BertForMaskedLM", *FIRST_TOKEN_HEADS])
def test_heads(cls: str, padding: str, backend: FakeBackend) -> None:  # noqa: F811
    upstream, ours = pair(cls)
    ours.set_padding(padding)
    for seed in range(3):
        inputs = head_inputs(cls, kind="holes", seed=seed)
        got = ours(**inputs)
        assert_close_fp32(got, directly(ours, **inputs))
        if cls in FIRST_TOKEN_HEADS or padding != "skip":
            assert_close_fp32(got, upstream(**inputs), factor=2e-5)
    assert backend.replays == 2


def test_types_and_positions(backend: FakeBackend) -> None:  # noqa: F811
    """Given in any order of calls, of either int dtype, in every shape that broadcasts; positions past the bucket's."""
    upstream, ours = pair()
    types = torch.randint(0, 3, (3, 11), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(13, 24).flip(0)
    cases: list[dict[str, torch.Tensor]] = [
        {},
        {"token_type_ids": types},
        {"token_type_ids": types.int()},
        {"position_ids": positions[None]},
        {"position_ids": positions[None].expand(3, 11).int()},
        {"token_type_ids": types, "position_ids": positions[None]},
    ]
    for _ in range(3):
        for case in cases:
            inputs = {**model_inputs(3, 11, "left"), **case}
            assert_close_fp32(ours(**inputs), upstream(**inputs))
    assert alive(ours) == 4 and backend.replays == 3 * 6 - 4
    long = {"input_ids": random_ids(1, 40), "position_ids": torch.arange(40)[None] % 24}  # longer than the table
    for _ in range(3):
        assert_close_fp32(ours(**long), upstream(**long))


def test_masks_of_any_dtype_and_stride() -> None:
    _, ours = pair()
    mask = ragged_mask(3, 22, "holes")
    for given in (mask[:, ::2], mask[:, ::2].bool(), mask[:, ::2] * 0.5, (mask[:, ::2] * 254).to(torch.uint8)):
        inputs = {"input_ids": random_ids(22, 3).t()[:3, :11], "attention_mask": given[:, :11]}
        for _ in range(2):
            assert_close_fp32(ours(**inputs), directly(ours, **inputs))


def test_outputs_held_are_never_written_again() -> None:
    _, ours = pair()
    held, copies = [], []
    for seed in range(12):
        B, S = 1 + seed % 4, 5 + seed
        held.append(tensors_of(ours(**model_inputs(B, S, "right", seed, **FLAGS))))
        copies.append({name: x.clone() for name, x in held[-1].items()})
    for before, after in zip(copies, held, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    memory = [x.untyped_storage().data_ptr() for outputs in held for x in {id(t): t for t in outputs.values()}.values()]
    assert len(memory) == len(set(memory)), "two tensors of the user share memory"


def test_inputs_are_only_read_and_inference_mode_mixes() -> None:
    _, ours = pair()
    inputs = model_inputs(3, 11, "holes")
    before = {name: x.clone() for name, x in inputs.items()}
    want = directly(ours, **inputs).last_hidden_state
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            made_inside = {name: x.clone() for name, x in inputs.items()}
            got = ours(**made_inside).last_hidden_state
            assert got.is_inference() == (mode is torch.inference_mode)
            assert_close_fp32(got, want)
    assert all(torch.equal(inputs[name], x) for name, x in before.items())


class Passes(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Overrides(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_when_not(monkeypatch: pytest.MonkeyPatch, backend: FakeBackend) -> None:  # noqa: F811
    """Each of these launches directly, says why, and leaves the graph for the next call."""
    _, ours = pair()
    inputs = model_inputs(3, 11, "right")
    for _ in range(2):
        want = ours(**inputs).last_hidden_state
    additive = torch.zeros(3, 1, 1, 11).masked_fill(inputs["attention_mask"][:, None, None] == 0, -1e9)
    embeds = ours.embeddings.word_embeddings(inputs["input_ids"])

    def check(reason: str, factor: float = 1e-5, **changes: Any) -> None:
        given = {k: v for k, v in {**inputs, **changes}.items() if v is not None}
        before = backend.replays
        assert_close_fp32(ours(**given).last_hidden_state.detach(), want, factor=factor)
        assert backend.replays == before
        assert reason in bert_fast.explain(ours, **given).graph

    with torch.enable_grad():
        check("gradients are on")
    with torch.autocast("cpu", torch.bfloat16):
        check("autocast is on", 16 * torch.finfo(torch.bfloat16).eps)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        ours(**inputs)
        assert bert_fast.explain(ours, **inputs).graph.startswith("replayed")
    for mode in (Passes(), Overrides()):  # transformers' code runs
        with mode:
            check("")
    check("4-D", attention_mask=additive)
    check("inputs_embeds", input_ids=None, inputs_embeds=embeds)
    with monkeypatch.context() as patch:
        patch.setenv("BERT_FAST_GRAPHS", "0")
        check("BERT_FAST_GRAPHS=0")
    backend.capturing_elsewhere = "the stream is under a capture"
    check("under a capture")
    backend.capturing_elsewhere = None
    before = backend.replays
    with torch.device("cpu"):  # as torch.set_default_device does
        ours(**inputs)
    torch.compile(ours, backend="eager")(**inputs)
    assert backend.replays == before + 1
    assert bert_fast.explain(ours, **inputs).graph == "replayed, bucket 4 x 24"
    assert "captured when" in bert_fast.explain(ours, **model_inputs(1, 11)).graph


def test_a_module_in_training(backend: FakeBackend) -> None:  # noqa: F811
    """Launches directly, even where nothing draws random numbers; the graphs of eval mode wait for the next call."""
    upstream, ours = pair(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    inputs = model_inputs(3, 11, "right")
    want = upstream(**inputs)

    def calls(captures: int, replays: int) -> str:
        before = backend.captures, backend.replays
        for _ in range(3):
            assert_close_fp32(ours(**inputs), want)
        assert (backend.captures, backend.replays) == (before[0] + captures, before[1] + replays)
        return bert_fast.explain(ours, **inputs).graph

    assert calls(1, 2).startswith("replayed")
    ours.train()
    assert "a module is in training mode" in calls(0, 0)
    ours.eval()
    assert calls(0, 3).startswith("replayed")
    ours.encoder.layer[1].output.dropout.train()
    assert "a module is in training mode" in calls(0, 0)
    ours.eval()
    assert calls(1, 2).startswith("replayed")


def test_bad_input_is_told_before_anything_is_copied(backend: FakeBackend) -> None:  # noqa: F811
    _, ours = pair()
    inputs = model_inputs(3, 11, "right")
    for _ in range(2):
        want = ours(**inputs)
    (entry,) = snapshot.held(ours).graphs.entries.values()
    before = [x.clone() for x in entry.inputs]
    for error, bad in (
        (IndexError, {"input_ids": inputs["input_ids"] + 50}),
        (RuntimeError, {"attention_mask": torch.ones(3, 12).tril()}),
        (RuntimeError, {"input_ids": inputs["input_ids"].float()}),
        (ValueError, {"input_ids": inputs["input_ids"][0]}),
    ):
        with pytest.raises(error):
            ours(**{**inputs, **bad})
    assert all(torch.equal(x, y) for x, y in zip(before, entry.inputs, strict=True))
    assert_equal(ours(**inputs), want)
