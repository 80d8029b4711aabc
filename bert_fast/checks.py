"""Bad input: one clear error each, raised before any kernel, naming the argument, its value and what was expected.

The exception types are those that transformers' BertModel raises for the same mistake (5.17 to 5.24). Index ranges are
checked on CPU, where looking costs nothing; on CUDA it would cost a synchronisation, so only when BERT_FAST_CHECK=1,
and without it an index outside its table gives NaN rows, never a read outside the table. What is checked is what will
be read, buffers included: people grow tables and forget a buffer.
"""

from __future__ import annotations

import os

import torch

from bert_fast.family import EmbeddingsView, ModelView
from bert_fast.installed import INPUTS, Inputs

INDEX_DTYPES = (torch.int32, torch.int64)


def _looks_at(ids: torch.Tensor) -> bool:
    """Whether the numbers in a tensor are looked at, which on a GPU waits for them."""
    return ids.is_cpu or os.environ.get("BERT_FAST_CHECK") == "1"


def _check_index(name: str, ids: torch.Tensor, *tables: tuple[int, str, type[Exception]]) -> None:
    """tables: size, name and error of what is read by `ids`, in order."""
    if not _looks_at(ids):
        return
    low, high = (int(x) for x in torch.aminmax(ids))
    for size, table, error in tables:
        if low < 0 or high >= size:
            value = low if low < 0 else high
            raise error(f"{name} holds {value}: index out of range, {table} has rows 0 to {size - 1}")


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


def check_one_of(inputs: Inputs) -> None:
    if (inputs.input_ids is None) == (inputs.inputs_embeds is None):
        given = "both" if inputs.input_ids is not None else "neither"
        raise ValueError(f"You must specify exactly one of input_ids or inputs_embeds, got {given}")


def check_inputs(view: ModelView, inputs: Inputs) -> tuple[int, int, Inputs]:
    """Check the arguments of a model's forward against the model and each other.

    Returns B, S and the inputs, whose mask is None where transformers drops it unread (`effective_mask`).

    Raises:
        ValueError: ids not (B, S) or embeds not (B, S, hidden).
        RuntimeError: dtype, device or shape of an argument, mask shape, S past a buffer, B or S of 0.
        IndexError: an id, position or token type outside its table (on CUDA only with BERT_FAST_CHECK=1).
    """
    input_ids, mask, _, _, inputs_embeds = inputs
    word = view.embeddings.word.weight
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
        name = INPUTS.input_ids if input_ids is not None else INPUTS.inputs_embeds
        raise RuntimeError(f"{name} has batch {B} and length {S}, expected both at least 1")
    if input_ids is not None:
        _check_ids(INPUTS.input_ids, input_ids, B, S, word.device)
        _check_index(INPUTS.input_ids, input_ids, (word.shape[0], "word_embeddings", IndexError))
    elif (
        inputs_embeds.shape[2] != word.shape[1]
        or inputs_embeds.dtype != word.dtype
        or inputs_embeds.device != word.device
    ):
        raise RuntimeError(
            f"inputs_embeds is {tuple(inputs_embeds.shape)} {inputs_embeds.dtype} on {inputs_embeds.device}, expected "
            f"(B, S, {word.shape[1]}) {word.dtype} on {word.device}"
        )
    check_positions(view.embeddings, inputs, B, S)
    if mask is not None and mask.shape != (B, S):
        inputs = inputs._replace(attention_mask=effective_mask(mask, B, S, view.heads, word.device))
    return B, S, inputs


def check_positions(view: EmbeddingsView, inputs: Inputs, B: int, S: int) -> None:
    """Check positions and token types, given or not, as transformers reads them.

    Token types that are not given are gathered from a buffer by position, and so must fit that too.
    """
    types, positions, device = inputs.token_type_ids, inputs.position_ids, view.word.weight.device
    rows = view.position.weight.shape[0]
    types_by_position = types is None and view.types is not None
    buffer = view.module.token_type_ids if types_by_position else None
    state = None
    if positions is not None:
        name = INPUTS.position_ids
        _check_ids(name, positions, B, S, device)
        if types_by_position and tuple(positions.shape) not in ((1, S), (B, S)):
            raise RuntimeError(
                f"{name} has shape {tuple(positions.shape)}, expected (1, {S}) or ({B}, {S}) where no "
                "token_type_ids are given"
            )
    elif view.positions is not None:
        name = f"{INPUTS.position_ids} counted from {INPUTS.input_ids}"
        positions = view.positions(inputs.input_ids, inputs.inputs_embeds) if device.type == "cpu" else None
    else:
        name, positions = f"{INPUTS.position_ids} by default", view.module.position_ids
        if S > positions.shape[1]:
            raise RuntimeError(
                f"input length S is {S}, expected at most {positions.shape[1]} (max_position_embeddings) where no "
                "position_ids are given"
            )
        state = _state(view, buffer) if _looks_at(positions) else None
        if state is not None and view.checked.get((S, types_by_position)) == state:
            positions = buffer = None
        else:
            positions = positions[:, :S]
    if positions is not None:
        tables = [(rows, "position_embeddings", IndexError)]
        if buffer is not None:
            tables.insert(0, (buffer.shape[1], "the buffer token_type_ids", RuntimeError))
        _check_index(name, positions, *tables)
    if types is not None:
        _check_ids(INPUTS.token_type_ids, types, B, S, device)
    elif buffer is not None and positions is not None and _looks_at(positions):
        types = buffer.expand(positions.shape[0], -1).gather(1, positions.long())
    if types is not None:
        _check_index(INPUTS.token_type_ids, types, (view.types.weight.shape[0], "token_type_embeddings", IndexError))
    if state is not None:
        view.checked[S, types_by_position] = state


def _state(view: EmbeddingsView, buffer: torch.Tensor | None) -> tuple[int, ...] | None:
    """Changes where a buffer that the defaults are read from, or a table, does (by `.data` too: torch raises there)."""
    positions, rows = view.module.position_ids, view.position.weight.shape[0]
    if positions.is_inference() or (buffer is not None and buffer.is_inference()):  # which count no changes
        return None
    types = (0, 0) if buffer is None else (buffer._version, view.types.weight.shape[0])
    return (positions._version, rows, *types)


def reads_part(mask: torch.Tensor, B: int, S: int) -> bool:
    """Whether a mask of two dimensions is too large for the batch, or one column, which transformers lets pass."""
    rows, columns = mask.shape
    return rows >= B and columns in (1, S) and (rows, columns) != (B, S)


def effective_mask(mask: torch.Tensor, B: int, S: int, heads: int, device: torch.device) -> torch.Tensor | None:
    """A mask that is not (B, S): as it is in 4-D; any other is dropped where nothing in it is 0, as transformers does.

    Raises:
        IndexError, RuntimeError or NotImplementedError, by its shape and dtype: any other mask, as transformers does.
    """
    shape = tuple(mask.shape)
    if mask.dim() == 4:
        if any(n not in (1, want) for n, want in zip(shape, (B, heads, S, S), strict=True)):
            raise RuntimeError(f"attention_mask has shape {shape}, expected one that broadcasts to {(B, heads, S, S)}")
        if mask.device != device:
            raise RuntimeError(f"attention_mask is on {mask.device}, expected {device}, the same device as the model")
        return mask
    if shape and bool((mask != 0).all()):  # on a GPU this waits for it, as transformers does for every mask
        return None
    error: type[Exception] = RuntimeError
    if len(shape) < 2 or shape[0] < B or shape[1] < shape[-1]:
        error = IndexError
    elif len(shape) > 2 and mask.is_floating_point():
        error = NotImplementedError
    raise error(f"attention_mask has shape {shape}, expected ({B}, {S}), the shape of the input, or 4-D")
