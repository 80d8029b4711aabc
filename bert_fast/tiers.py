"""Which tier runs a call: pure functions from (module, call) to the reason why not the encoder tier, or None.

Encoder tier: the whole model on packed rows through our ops. Upstream tier: transformers' own forward, same result.
A module is plain when running its parameters through our ops is what calling it would do: transformers' or torch's
exact class, no hook, no parametrization, no replaced forward, ordinary parameters of the model's dtype and device.
"""

from __future__ import annotations

import logging
from operator import attrgetter
from types import CodeType
from typing import Any

import torch
from torch import nn
from transformers import activations
from transformers.utils import output_capturing

from bert_fast.checks import reads_part
from bert_fast.family import METHODS, UPSTREAM, Family, family_of
from bert_fast.installed import INPUTS, IS_CAUSAL, ModelArguments
from bert_fast.kernels.attention import MAX_HEAD_DIM
from bert_fast.kernels.runtime import unsupported_reason
from bert_fast.surroundings import TORCH_GELU

logger = logging.getLogger("bert_fast")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa", "bert_fast")

# class of hidden_act's module in transformers.activations or torch.nn -> act of our kernels
_NAMES = {"GELUActivation": "gelu", "NewGELUActivation": "gelu_tanh", "GELUTanh": "gelu_tanh", "SiLUActivation": "silu"}
ACTIVATIONS: dict[type, str] = {nn.ReLU: "relu", nn.SiLU: "silu"}
ACTIVATIONS |= {getattr(activations, name): act for name, act in _NAMES.items() if hasattr(activations, name)}


def _nested_code(function: Any, name: str) -> CodeType | None:
    constants = function.__code__.co_consts if function is not None else ()
    return next((c for c in constants if isinstance(c, CodeType) and c.co_name == name), None)


# transformers leaves this hook on layers and attentions after a first call that asked for outputs; it only reads
# (the name is upstream's spelling; under another one the hook would simply count as a hook)
CAPTURE_HOOK = _nested_code(getattr(output_capturing, "install_output_capuring_hook", None), "output_capturing_hook")

# What a call of each class runs, as imported: whoever replaces one of these for everybody gets transformers' forward.
FORWARDS: dict[type, Any] = {cls: cls.forward for cls in ACTIVATIONS}


def register_family(family: Family) -> None:
    """Keep what transformers' classes of a family, and ours, run now, before anybody replaces it."""
    FORWARDS.update(family.forwards)
    FORWARDS.update((cls, cls.forward) for cls in family.derived)
    _ = family.functions


def is_capture_hook(hook: Any) -> bool:
    """Whether a forward hook is transformers' own, which only reads."""
    return getattr(hook, "__code__", None) is CAPTURE_HOOK


def _hook_reason(module: nn.Module) -> str | None:
    if module._forward_hooks:
        for hook in list(module._forward_hooks.values()):  # another thread may register one meanwhile
            if not is_capture_hook(hook):
                return "has a forward hook"
    if module._forward_pre_hooks:
        return "has a forward pre-hook"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has a backward hook"
    own = module.__dict__.get("forward")  # of the instance: somebody's, or its class's own put back
    if own is not None:
        if getattr(own, "__func__", None) is not type(module).forward or own.__self__ is not module:
            return "has a replaced forward"
    for name in METHODS:
        if name in module.__dict__:
            return f"has a replaced {name}"
    return None


def module_reason(module: nn.Module | None, expected: type) -> str | None:
    """Why `module` is not simply an `expected` (its upstream class or our subclass of the same name)."""
    cls = type(module)
    if cls is not expected and UPSTREAM.get(cls) is not expected:
        return f"is a {cls.__module__}.{cls.__qualname__}, not {expected.__module__}.{expected.__qualname__}"
    assert module is not None
    for kind in (expected, cls):
        if kind.forward is not FORWARDS.get(kind, kind.forward):
            return f"is a {cls.__qualname__}, whose forward was replaced"
    return _hook_reason(module)


def _tensor_reason(tensor: Any, name: str, shape: tuple[int, ...], like: torch.Tensor) -> str | None:
    if type(tensor) is not nn.Parameter and type(tensor) is not torch.Tensor:
        return f"{name} is a {type(tensor).__name__}"
    if tensor.dtype != like.dtype or tensor.device != like.device:
        return f"{name} is {tensor.dtype} on {tensor.device}, the model {like.dtype} on {like.device}"
    if tuple(tensor.shape) != shape:
        return f"{name} has shape {tuple(tensor.shape)}, expected {shape}"
    if not tensor.is_contiguous():
        return f"{name} is not contiguous"
    return None


def linear_reason(module: nn.Module, in_features: int, out_features: int, like: torch.Tensor) -> str | None:
    """Why `module` is not a plain nn.Linear(in_features, out_features) with a bias."""
    return (
        module_reason(module, nn.Linear)
        or _tensor_reason(module._parameters.get("weight"), "weight", (out_features, in_features), like)
        or _tensor_reason(module._parameters.get("bias"), "bias", (out_features,), like)
    )


def layer_norm_reason(module: nn.Module, size: int, like: torch.Tensor) -> str | None:
    """Why `module` is not a plain nn.LayerNorm over `size` with weight and bias."""
    return (
        module_reason(module, nn.LayerNorm)
        or _tensor_reason(module._parameters.get("weight"), "weight", (size,), like)
        or _tensor_reason(module._parameters.get("bias"), "bias", (size,), like)
    )


def _embedding_reason(module: nn.Module, like: torch.Tensor) -> str | None:
    reason = module_reason(module, nn.Embedding)
    if reason is None and (module.max_norm is not None or module.sparse or module.scale_grad_by_freq):
        reason = "uses max_norm, sparse or scale_grad_by_freq"
    weight = module._parameters.get("weight")
    rows = weight.shape[0] if isinstance(weight, torch.Tensor) and weight.dim() else 0
    return reason or _tensor_reason(weight, "weight", (rows, like.shape[1]), like)


def activation_name(module: Any) -> str | None:
    """The kernels' name of the module that hidden_act made, None where the kernels have no such activation."""
    return ACTIVATIONS.get(type(module))


def activation_reason(module: Any) -> str | None:
    cls = type(module)
    if activation_name(module) is None:
        return f"activation {cls.__name__} has no kernel"
    if "act" in module.__dict__:  # the function that transformers' GELU modules call
        function = getattr(module.act, "func", getattr(module.act, "__func__", module.act))
        known = (TORCH_GELU, getattr(cls, "_gelu_python", None), getattr(cls, "_gelu_tanh_python", None))
        if function not in known:
            return f"activation {cls.__name__} calls another function"
    return module_reason(module, cls)


def _parts_reason(path: str, parts: list[tuple[str, str | None]]) -> str | None:
    for name, reason in parts:
        if reason is not None:
            return f"{path}{'.' if name else ''}{name} {reason}"
    return None


def embedding_parts_reason(module: nn.Module, like: torch.Tensor) -> str | None:
    """Why the tables, LayerNorm and dropout of embeddings are not plain; like: the word table."""
    tables = ["word_embeddings", "position_embeddings"]
    buffers = [INPUTS.position_ids]
    if hasattr(module, "token_type_embeddings"):
        tables.append("token_type_embeddings")
        buffers.append(INPUTS.token_type_ids)
    for name in tables:
        reason = _embedding_reason(getattr(module, name), like)
        if reason is None and name == "token_type_embeddings" and module.token_type_embeddings.padding_idx is not None:
            reason = "has a padding_idx"
        if reason is not None:
            return f"({name}) {reason}"
    if not all(hasattr(module, name) for name in buffers):
        return "has lost a buffer"
    return norm_parts_reason(module, like.shape[1], like)


def norm_parts_reason(module: nn.Module, size: int, like: torch.Tensor) -> str | None:
    """Why the LayerNorm and the dropout of embeddings, or of what follows a projection, are not plain."""
    for name, part in (
        ("LayerNorm", layer_norm_reason(module.LayerNorm, size, like)),
        ("dropout", module_reason(module.dropout, nn.Dropout)),
    ):
        if part is not None:
            return f"({name}) {part}"
    return None


def attention_shape_reason(own: nn.Module, heads: int, size: int, scale: Any) -> str | None:
    """Why the kernels cannot be the attention of this module, whatever its projections; size: of all heads together."""
    if getattr(own, "is_decoder", False) or getattr(own, IS_CAUSAL, False):
        return "is causal"
    if heads * own.attention_head_size != size:
        return "has heads that do not make up its size"
    if own.attention_head_size > MAX_HEAD_DIM:
        return f"has head_dim {own.attention_head_size}, the kernels take up to {MAX_HEAD_DIM}"
    if not isinstance(scale, (int, float)) or not scale > 0:
        return f"has scaling {scale}, the kernels take numbers above 0"
    return None


def function_reason(family: Family) -> str | None:
    if family.current_functions() != family.functions:
        return "a function of transformers that makes masks, attends or chunks was replaced"
    return None


def layer_reason(family: Family, layer: nn.Module, path: str, like: torch.Tensor, config: Any) -> str | None:
    """Why one layer cannot run on our ops; like: a tensor (any, hidden) of the model's dtype and device."""
    hidden, names = like.shape[1], family.names
    for name, cls in family.layer_classes.items():
        try:
            module = attrgetter(name)(layer) if name else layer
        except AttributeError:
            module = None
        reason = module_reason(module, cls)
        if reason is None and getattr(module, "chunk_size_feed_forward", 0):
            reason = f"chunks its feed-forward by {module.chunk_size_feed_forward}"
        if reason is None and (getattr(module, "is_decoder", False) or getattr(module, "add_cross_attention", False)):
            reason = "is a decoder's"
        if reason is not None:
            return f"{path}{'.' if name else ''}{name} {reason}"
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        return f"{path} is checkpointed"
    try:
        view = family.layer_view(layer)
    except AttributeError as error:
        return f"{path} has lost a part: {error}"
    own = getattr(view.attention, "config", config)
    reason = attention_shape_reason(view.attention, view.heads, hidden, view.scale)
    if own._attn_implementation != config._attn_implementation:
        reason = f"has attn_implementation={own._attn_implementation!r} by itself"
    if reason:
        return f"{path}.{names.attention} {reason}"
    wide = getattr(view.up, "out_features", 0)
    dropout = None if view.attention_dropout is None else module_reason(view.attention_dropout, nn.Dropout)
    if dropout is None and family.dropout_is_called:
        # elsewhere hooks on it never fire: only its p and the parent's training flag are read
        dropout = module_reason(view.attention.dropout, nn.Dropout)
    return _parts_reason(
        path,
        [
            *(
                (f"{names.attention}.{name}", linear_reason(part, hidden, hidden, like))
                for name, part in zip(names[1:4], view[:3], strict=True)
            ),
            (names.attention_dense, linear_reason(view.attention_dense, hidden, hidden, like)),
            (names.attention_dropout or names.attention, dropout),
            (names.attention_norm, layer_norm_reason(view.attention_norm, hidden, like)),
            (names.up, linear_reason(view.up, hidden, wide, like)),
            (names.act, activation_reason(view.act)),
            (names.down, linear_reason(view.down, wide, hidden, like)),
            (names.dropout, module_reason(view.dropout, nn.Dropout)),
            (names.norm, layer_norm_reason(view.norm, hidden, like)),
        ],
    )


def pooler_reason(family: Family, pooler: nn.Module, like: torch.Tensor) -> str | None:
    reason = module_reason(pooler, family.pooler_class)
    hidden = like.shape[1]
    return _parts_reason(
        "pooler",
        [("", reason)]
        if reason
        else [
            ("dense", linear_reason(pooler.dense, hidden, hidden, like)),
            ("activation", module_reason(pooler.activation, nn.Tanh)),
        ],
    )


def word_table(model: nn.Module) -> torch.Tensor | None:
    """The word embeddings (V, size) of a model, if it has such a table: the model's dtype and device."""
    word = getattr(getattr(model.embeddings, "word_embeddings", None), "weight", None)
    return word if isinstance(word, torch.Tensor) and word.dim() == 2 else None


def embeddings_reason(family: Family, model: nn.Module, word: torch.Tensor) -> str | None:
    module = model.embeddings
    reason = module_reason(module, family.embeddings_class) or embedding_parts_reason(module, word)
    return reason and f"embeddings {reason}"


def model_reason(model: nn.Module) -> str | None:
    """Why the modules of one of our models cannot run on the encoder tier."""
    family, config = family_of(model), model.config
    if family.model.forward is not FORWARDS[family.model]:
        return f"the forward of {family.model.__name__} was replaced"
    if getattr(config, "is_decoder", False) or getattr(config, IS_CAUSAL, False):
        return "the model is a decoder"
    if config._attn_implementation not in ATTENTION_IMPLEMENTATIONS:
        return f"attn_implementation={config._attn_implementation!r} was chosen"
    if mask_function(model) is not family.model.__dict__.get("_create_attention_masks"):
        return "the model makes its own attention masks"
    reason = function_reason(family) or family.difference()
    if reason:
        return reason
    word = word_table(model)
    if word is None:
        return "embeddings.word_embeddings has no ordinary table"
    if word.dtype not in DTYPES:
        return f"parameters are {word.dtype}"
    reason = unsupported_reason(word.device) or embeddings_reason(family, model, word)
    for name, cls in family.model_classes.items():
        reason = reason or _parts_reason(name, [("", module_reason(getattr(model, name, None), cls))])
    if reason:
        return reason
    layers = family.layers_of(model)
    if type(layers) is not nn.ModuleList or not len(layers):
        return f"{family.layers} is not an ordinary list of layers"
    like = word.new_empty(1).expand(1, config.hidden_size)
    project = getattr(model, family.project, None) if family.project else None
    if project is not None:
        reason = _parts_reason("embeddings_project", [("", linear_reason(project, word.shape[1], like.shape[1], like))])
    elif word.shape[1] != like.shape[1]:
        reason = f"embeddings have {word.shape[1]} numbers, not {like.shape[1]}"
    if reason is None and family.relative_positions:
        bias = model.encoder.relative_attention_bias
        reason = _embedding_reason(bias, word.new_empty(1).expand(1, config.num_attention_heads))
        reason = reason and f"encoder.relative_attention_bias {reason}"
    if reason:
        return reason
    for i, layer in enumerate(layers):
        reason = layer_reason(family, layer, f"{family.layers}.{i}", like, config)
        if reason:
            return reason
    owners = {id(family.layer_view(layer).attention): layer for layer in layers}
    if len(owners) < len(set(layers)):  # whose weights transformers' hooks collect once for every owner
        return "an attention module belongs to two layers"
    pooler = family.pooler_of(model)
    return None if pooler is None else pooler_reason(family, pooler, like)


def mask_function(model: nn.Module) -> Any:
    """The method that makes transformers' masks, None where a model has none."""
    return getattr(getattr(model, "_create_attention_masks", None), "__func__", None)


def call_reason(given: ModelArguments, dtype: torch.dtype) -> str | None:
    """What about the arguments of one forward call needs transformers' code; dtype: the model's."""
    if given.unserved is not None:
        return f"argument {given.unserved!r} is left to transformers"
    inputs = given.inputs
    for name, value in zip(INPUTS, inputs, strict=True):
        if value is not None and type(value) not in (torch.Tensor, nn.Parameter):
            return f"{name} is a {type(value).__name__}"
    first, mask, embeds = inputs.given, inputs.attention_mask, inputs.inputs_embeds
    if first is None:
        return None
    for ids in (inputs.token_type_ids, inputs.position_ids):
        if ids is not None and ids.dim() == 2 and len(first) == 1 < len(ids):
            return f"{INPUTS[2 if ids is inputs.token_type_ids else 3]} make a batch of one input"
    if mask is not None and mask.dim() == 4 and mask.dtype not in (torch.bool, dtype):
        return f"{INPUTS.attention_mask} is a 4-D mask of {mask.dtype}, the model is {dtype}"
    if mask is not None and mask.dim() == 2 and first.dim() > 1 and reads_part(mask, *first.shape[:2]):
        return f"{INPUTS.attention_mask} is {tuple(mask.shape)}, of which transformers reads a part or repeats it"
    if embeds is not None and embeds.dtype != dtype and torch.promote_types(embeds.dtype, dtype) == dtype:
        return f"{INPUTS.inputs_embeds} is {embeds.dtype}, the model is {dtype}"
    return None


_warned: set[str] = set()


def warn_once(reason: str) -> None:
    """Say once per reason that a model is not fused as a whole."""
    if reason not in _warned:
        _warned.add(reason)
        logger.warning("transformers' own forward drives, the model is not fused as a whole: %s", reason)
