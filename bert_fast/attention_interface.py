"""attn_implementation="bert_fast": our attention in any transformers model whose attention is a plain softmax.

Importing bert_fast registers `attention_forward` and `attention_mask` with transformers under that name. A model built
with it, or told by `model.set_attn_implementation("bert_fast")`, then calls them in every layer: encoders, decoders
with a cache, cross-attention, grouped heads. Outputs, attentions and gradients are those of "eager".

Masks come as transformers builds them for sdpa, 4-D bool, so padding, sliding windows and packed sequences are in them.
Weights are computed where somebody wants them, and returned; where torch is compiling, or a dtype, device or shape is
not ours, transformers' own functions run with the same mask.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.utils import output_capturing

from bert_fast.installed import ATTENTIONS, CHANGES_SCORES, CHANGES_SCORES_PARTS, IS_CAUSAL
from bert_fast.kernels.attention_base import MAX_HEAD_DIM
from bert_fast.kernels.attention_heads import attention_heads
from bert_fast.kernels.attention_heads_base import additive, causal_mask
from bert_fast.kernels.dropout import make_seed
from bert_fast.kernels.runtime import unsupported_reason, without_autocast
from bert_fast.packing import own_mask
from bert_fast.surroundings import surroundings_reason
from bert_fast.tiers import is_capture_hook

NAME = "bert_fast"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN_CAUSAL = "_bert_fast_plain_causal"

Tensor = torch.Tensor
Attended = tuple[Tensor, Tensor | None]


def attention_mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True, **kwargs: Any,
) -> Tensor | None:  # fmt: skip
    """transformers' mask (B, 1, q_length, kv_length), bool where the model knows such masks, else eager's; or None.

    sdpa's also is None where it is causal and nothing else, and then a model that slices its masks (Gemma 4, whose last
    layers have the last queries alone) must know of sdpa. Here such a mask is made, and marked as what it is:
    `attention_forward` need not read it. Whatever a model computes from it bears no mark.
    """
    sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
    if torch.compiler.is_compiling() or not _knows_bool_masks(type(kwargs.get("config"))):
        return eager_mask(**sizes, attention_mask=attention_mask, **kwargs)
    if not allow_is_causal_skip:
        return sdpa_mask(**sizes, attention_mask=attention_mask, allow_is_causal_skip=False, **kwargs)
    mask = sdpa_mask(**sizes, attention_mask=attention_mask, allow_is_causal_skip=True, **kwargs)
    if mask is None and q_length > 1:
        mask = sdpa_mask(**sizes, attention_mask=None, allow_is_causal_skip=False, **kwargs)
        if mask is not None and not mask.is_inference():  # which do not count what is written into them
            setattr(mask, _PLAIN_CAUSAL, mask._version)
    return mask


@functools.cache
def _knows_bool_masks(config_class: type) -> bool:
    """Whether a model's file uses the interface and supports sdpa; others (MPNet, BLOOM) add their masks themselves."""
    name = config_class.__module__.replace("configuration_", "modeling_")
    modeling = sys.modules.get(name)
    if not hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
        return False
    own = (x for x in vars(modeling).values() if getattr(x, "__module__", None) == name)
    return any(getattr(x, "_supports_sdpa", False) for x in own)


def _is_plain_causal(mask: Tensor) -> bool:
    version = getattr(mask, _PLAIN_CAUSAL, None)
    return version is not None and version == mask._version


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None,
    position_bias: Tensor | None = None, **kwargs: Any,
) -> Attended:  # fmt: skip
    """query (B, H, Sq, D), key and value (B, Hkv, Skv, D) -> context (B, Sq, H, D) and weights (B, H, Sq, Skv) or None.

    attention_mask: bool (keep), floating (added) or None, and then causal by `is_causal`, else `module.is_causal`, as
    in transformers' sdpa, but not where neither says anything. position_bias (T5) is added to the scores.

    Raises:
        NotImplementedError: an argument changes the scores in a way that is not here (softcap, attention sinks, ...).
    """
    _check_arguments(kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    p = dropout if module.training else 0.0
    mask, causal, around = attention_mask, False, surroundings_reason()
    if mask is None:
        causal = query.shape[2] > 1 and bool(getattr(module, IS_CAUSAL, False) if is_causal is None else is_causal)
    elif not around and _is_plain_causal(mask) and mask.shape[2:] == (query.shape[2], key.shape[2]):
        mask, causal = None, True
    if position_bias is not None:
        added = _added(mask, causal, query, key)
        mask, causal = position_bias if added is None else added + position_bias, False
    wanted = _weights_wanted(module, kwargs)
    if around or _reason(query, key, value, mask, scale, wanted):
        return _upstream(module, query, key, value, mask, causal, scale, p, wanted)
    dtype = _compute_dtype(query)
    query, key, value = (x.to(dtype) if x.stride(3) == 1 else x.to(dtype).contiguous() for x in (query, key, value))
    seed = make_seed(query.device) if p else None
    if mask is not None and mask.is_floating_point():  # which the caller may write into before backward, as in eager
        mask = own_mask(mask, True, p)
    with without_autocast(query.device.type):
        context, weights, _ = attention_heads(query, key, value, mask, causal, scale, wanted, seed, 0, p)
        if wanted and weights.requires_grad:  # the context is made of them, so that its gradient goes through them
            (B, H, Sq, Skv), Hkv = weights.shape, key.shape[1]
            context = (weights.view(B, Hkv, -1, Skv) @ value).view(B, H, Sq, -1).transpose(1, 2).contiguous()
    return context, weights if wanted else None


def _check_arguments(kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        refused = name in CHANGES_SCORES or any(part in name for part in CHANGES_SCORES_PARTS)
        if refused and value is not None and value is not False:
            shown = f"a {value.dtype} tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise NotImplementedError(
                f"attn_implementation={NAME!r}: {name} is {shown}, expected None, since only a plain softmax of scaled"
                " and masked scores is computed; attn_implementation='eager' runs such a model"
            )


def _weights_wanted(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Asked for by argument or configuration, collected by transformers' hooks, or seen by somebody's hook."""
    asked = kwargs.get(ATTENTIONS)
    if asked is None:
        asked = getattr(getattr(module, "config", None), ATTENTIONS, False)
    collected = output_capturing._active_collector.get()
    return bool(
        asked
        or (collected and any("attentions" in key for key in collected))
        or not all(map(is_capture_hook, list(module._forward_hooks.values())))
    )


def _autocast(x: Tensor) -> bool:
    """Whether a product of x and its like has the dtype that autocast chooses."""
    device = x.device.type
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and x.dtype in DTYPES


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if _autocast(x) else x.dtype


def _reason(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: Any, wanted: bool) -> str | None:
    """Why this call is not for our op."""
    dtype, device = _compute_dtype(query), query.device
    for x in (query, key, value) if mask is None else (query, key, value, mask):
        if type(x) not in (Tensor, nn.Parameter) or x.dim() != 4 or x.device != device or not x.numel():
            return f"a tensor is a {type(x).__name__} of shape {tuple(x.shape)} on {x.device}"
    reason = unsupported_reason(device)
    if reason:
        return reason
    if dtype not in DTYPES or any(_compute_dtype(x) != dtype for x in (key, value)):
        return f"dtypes are {query.dtype}, {key.dtype} and {value.dtype}"
    (B, H, Sq, D), (Hkv, Skv) = query.shape, key.shape[1:3]
    if key.shape != (B, Hkv, Skv, D) or value.shape != key.shape or H % Hkv or D > MAX_HEAD_DIM:
        return f"shapes are {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
    if mask is not None:
        if any(n not in (1, want) for n, want in zip(mask.shape, (B, H, Sq, Skv), strict=True)):
            return f"the mask has shape {tuple(mask.shape)}"
        if mask.dtype != torch.bool and not mask.is_floating_point():
            return f"the mask is {mask.dtype}"
    if not isinstance(scale, int | float) or not 0 < scale < math.inf:
        return f"scaling is {scale}"
    if wanted and _autocast(query):
        return "weights under autocast have a dtype that differs from model to model"
    return None


def _added(mask: Tensor | None, causal: bool, query: Tensor, key: Tensor, dtype: torch.dtype | None = None) -> Any:
    """Mask and causal order as one mask to add, as eager's are: never a row of nothing but -inf."""
    if causal:
        mask = causal_mask(query.shape[2], key.shape[2], query.device)
    if mask is None:
        return None
    # Under autocast eager's mask has the dtype of the model, and so have the scores that it is added to.
    return additive(mask, dtype or (torch.float32 if _autocast(query) else query.dtype))


def _upstream(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: Any,
    p: float, wanted: bool,
) -> Attended:  # fmt: skip
    """The same by transformers: sdpa, or where weights are wanted the eager function of the module's own file.

    That one too where gradients may flow past a mask: sdpa's backward has wrong ones of a query without a key.
    """
    if wanted or (torch.is_grad_enabled() and mask is not None):
        added = _added(mask, causal, query, key)
        context, weights = _eager_of(module)(module, query, key, value, added, scaling=scale, dropout=p)
        return context, weights if wanted else None
    dtype = _compute_dtype(query)
    added = _added(mask, causal, query, key, dtype)
    if added is not None and added.dtype != dtype:  # autocast would make -inf of the lowest number
        added = added.clamp(min=torch.finfo(dtype).min)
    return sdpa_attention_forward(module, query, key, value, added, dropout=p, scaling=scale, is_causal=False)


def _eager_of(module: nn.Module) -> Callable[..., Attended]:
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    return _eager


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: Any, dropout: float
) -> Attended:
    key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    weights = torch.softmax(scores if mask is None else scores + mask, -1, torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)
