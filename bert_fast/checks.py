"""Bad input: one clear error each, raised before any kernel, naming the argument, its value and what was expected.

The exception types are those that transformers' BertModel raises for the same mistake (5.17 to 5.23). Index ranges are
checked on CPU, where looking costs nothing; on CUDA it would cost a synchronisation, so only when BERT_FAST_CHECK=1,
and without it an index outside its table gives NaN rows, never a read outside the table.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from bert_fast.family import ModelView

INDEX_DTYPES = (torch.int32, torch.int64)


def _check_index(name: str, ids: torch.Tensor, size: int, table: str, error: type[Exception]) -> None:
    if not ids.is_cpu and os.environ.get("BERT_FAST_CHECK") != "1":
        return
    low, high = (int(x) for x in torch.aminmax(ids))
    if low < 0 or high >= size:
        raise error(f"{name} holds {low if low < 0 else high}: index out of range, {table} has rows 0 to {size - 1}")


def _check_ids(name: str, ids: torch.Tensor, B: int, S: int, device: torch.device) -> None:
    """dtype and device of an index tensor, and that it broadcasts to (B, S)."""
    if ids.dtype not in INDEX_DTYPES:
        raise RuntimeError(f"{name} has dtype {ids.dtype}, expected torch.int64 or torch.int32")
    if ids.device != device:
        raise RuntimeError(f"{name} is on {ids.device}, expected {device}, where the model is: all on the same device")
    if ids.shape == (B, S):
        return
    if ids.dim() > 2 or any(n not in (1, want) for n, want in zip(reversed(ids.shape), (S, B), strict=False)):
        raise RuntimeError(f"{name} has shape {tuple(ids.shape)}, expected ({B}, {S}) or one that broadcasts to it")


def check_one_of(input_ids: Any, inputs_embeds: Any) -> None:
    if (input_ids is None) == (inputs_embeds is None):
        given = "both" if input_ids is not None else "neither"
        raise ValueError(f"You must specify exactly one of input_ids or inputs_embeds, got {given}")


def check_inputs(
    view: ModelView,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
) -> tuple[int, int]:
    """Check the arguments of a model's forward against the model and each other; returns (B, S).

    Raises:
        ValueError: ids not (B, S) or embeds not (B, S, hidden).
        RuntimeError: dtype, device or shape of an argument, mask shape, S past the position table, B or S of 0.
        IndexError: an id or token type outside its table (on CUDA only with BERT_FAST_CHECK=1).
    """
    embeddings = view.embeddings
    word = embeddings.word.weight
    if input_ids is not None:
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected (B, S)")
        B, S = input_ids.shape
    else:
        assert inputs_embeds is not None
        if inputs_embeds.dim() != 3:
            raise ValueError(f"inputs_embeds has shape {tuple(inputs_embeds.shape)}, expected (B, S, {word.shape[1]})")
        B, S = inputs_embeds.shape[:2]
    if B == 0 or S == 0:
        name = "input_ids" if input_ids is not None else "inputs_embeds"
        raise RuntimeError(f"{name} has batch {B} and length {S}, expected both at least 1")
    if input_ids is not None:
        _check_ids("input_ids", input_ids, B, S, word.device)
        _check_index("input_ids", input_ids, word.shape[0], "word_embeddings", IndexError)
    elif (
        inputs_embeds.shape[2] != word.shape[1]
        or inputs_embeds.dtype != word.dtype
        or inputs_embeds.device != word.device
    ):
        raise RuntimeError(
            f"inputs_embeds is {tuple(inputs_embeds.shape)} {inputs_embeds.dtype} on {inputs_embeds.device}, expected "
            f"(B, S, {word.shape[1]}) {word.dtype} on {word.device}"
        )
    table = embeddings.position.weight.shape[0]
    # token types that are not given, transformers looks up by position first, and that gather raises RuntimeError
    types_by_position = token_type_ids is None and embeddings.types is not None
    error = RuntimeError if types_by_position else IndexError
    if position_ids is not None:
        _check_ids("position_ids", position_ids, B, S, word.device)
        if types_by_position and tuple(position_ids.shape) not in ((1, S), (B, S)):
            raise RuntimeError(
                f"position_ids has shape {tuple(position_ids.shape)}, expected (1, {S}) or ({B}, {S}) where no "
                "token_type_ids are given"
            )
        _check_index("position_ids", position_ids, table, "position_embeddings", error)
    elif embeddings.positions is not None:
        if word.is_cpu:
            counted = embeddings.positions(input_ids, inputs_embeds)
            _check_index("position_ids counted from input_ids", counted, table, "position_embeddings", error)
    elif S > (longest := embeddings.module.position_ids.shape[1]):
        raise RuntimeError(
            f"input length S is {S}, expected at most {longest} (max_position_embeddings) where no position_ids "
            "are given"
        )
    if token_type_ids is not None:
        _check_ids("token_type_ids", token_type_ids, B, S, word.device)
        types = embeddings.types.weight.shape[0]
        _check_index("token_type_ids", token_type_ids, types, "token_type_embeddings", IndexError)
    if attention_mask is not None:
        _check_mask(attention_mask, B, S, view.heads, word.device)
    return B, S


def _check_mask(mask: torch.Tensor, B: int, S: int, heads: int, device: torch.device) -> None:
    if mask.shape == (B, S):
        return
    shape = tuple(mask.shape)
    if mask.dim() == 2:
        if shape != (B, S):
            raise RuntimeError(f"attention_mask has shape {shape}, expected ({B}, {S}), the shape of the input")
    elif mask.dim() == 4:
        if any(n not in (1, want) for n, want in zip(shape, (B, heads, S, S), strict=True)):
            raise RuntimeError(f"attention_mask has shape {shape}, expected one that broadcasts to {(B, heads, S, S)}")
        if mask.device != device:
            raise RuntimeError(f"attention_mask is on {mask.device}, expected {device}, the same device as the model")
    else:
        raise RuntimeError(f"attention_mask has shape {shape}, expected ({B}, {S}) or 4-D (B, heads, S, S)")
