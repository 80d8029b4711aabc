"""explain: which tier a call takes and why, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bert_fast import graphs, modeling, modules, upstream
from bert_fast.checks import check_inputs
from bert_fast.installed import (
    CACHE,
    CROSS_STATES,
    INPUTS,
    ModelArguments,
    Signature,
    below_model,
    model_arguments,
    of_embeddings,
    reaching_base,
)
from bert_fast.snapshot import Snapshot


@dataclass(frozen=True)
class Explanation:
    """tier: "encoder" (the whole base model fused), "module" (transformers' forward drives, some of its modules are
    fused) or "upstream" (transformers' code alone); reason: why not the encoder tier, or None;

    padding: "exact" or "skip"; rows: (module, "fused" or "transformers", why) for the model and its parts; graph: in
    the encoder tier, whether a CUDA graph would be replayed, else why not.
    """

    tier: str
    reason: str | None
    padding: str
    rows: tuple[tuple[str, str, str], ...]
    graph: str = ""

    def __str__(self) -> str:
        widths = [max(len(row[i]) for row in self.rows) for i in (0, 1)]
        lines = [f"{name:<{widths[0]}}  {how:<{widths[1]}}  {why}".rstrip() for name, how, why in self.rows]
        first = [f"tier: {self.tier}" + (f" ({self.reason})" if self.reason else "")]
        return "\n".join([*first, *([f"graph: {self.graph}"] if self.graph else []), *lines])


def _row(name: str, reason: str | None) -> tuple[str, str, str]:
    return (name, "fused", "") if reason is None else (name, "transformers", reason)


@dataclass(frozen=True)
class _BaseCall:
    """The call of a base model: why not the encoder tier, else the snapshot; its arguments, and these by role."""

    reason: str | None
    plain: Snapshot | None
    arguments: ModelArguments
    given: dict[str, Any]


def _base_call(model: torch.nn.Module, base: Any, inputs: dict[str, Any]) -> _BaseCall:
    """Of the call of `base` that `model(**inputs)` makes."""
    signature: Signature = base._signature
    if model is not base:
        # a head whose model collects outputs itself hands on what it names, and nothing else
        head = None if base._family.own_outputs else getattr(model, "_signature", None)
        inputs = reaching_base(head, signature, inputs)
    given, arguments = signature.bind((), inputs), model_arguments(signature, base.config, (), inputs)
    if given is None or arguments is None:
        raise TypeError(f"an argument is given twice: {', '.join(inputs)}")
    if type(model).__name__.endswith("ForMultipleChoice"):  # (B, choices, S) is (B * choices, S) to its base
        kept = {INPUTS.inputs_embeds: 2}  # trailing dimensions
        flat = {k: x for k, x in zip(INPUTS, arguments.inputs, strict=True) if isinstance(x, torch.Tensor)}
        flat = {k: x.reshape(-1, *x.shape[-kept.get(k, 1) :]) for k, x in flat.items()}
        given, arguments = given | flat, arguments._replace(inputs=arguments.inputs._replace(**flat))
    return _BaseCall(*modeling.encoder_check(base, arguments), arguments, given)


def _launch(model: torch.nn.Module, base: Any, call: _BaseCall) -> tuple[str, str]:
    """(padding, graph) of a call; as "exact" and none where it is not of the encoder tier, or would raise."""
    if call.plain is None or call.arguments.inputs.given is None:
        return "exact", ""
    try:
        B, S, inputs = check_inputs(call.plain.view, call.arguments.inputs)
    except (IndexError, RuntimeError, ValueError):
        return "exact", ""
    heads = (m for m in model.modules() if isinstance(m, modeling.FirstTokenHead) and m.base_model is base)
    first_token_only = any(map(modeling.reads_first_token_only, heads))
    launched = modeling.make_call(base, call.plain, B, S, inputs, call.arguments, first_token_only)
    skips = launched.skip and launched.attention_mask is not None
    return "skip" if skips else "exact", graphs.plan(call.plain, launched)


def _call_reason(base: Any, module: modules.FusedModule, given: dict[str, Any]) -> str | None:
    """What about the arguments of the base model's call makes one of its modules run transformers' code."""
    if isinstance(module, modules.Embeddings):
        return modules.embeddings_call_reason(module, of_embeddings(given))
    kind = base._family.layer_classes[""]
    layers = [m for m in base.modules() if isinstance(m, kind)]
    layer = next((layer for layer in layers if module in layer.modules()), None)
    if layer is None:
        return None
    if _enters_in_half(base, layer, module, layer is layers[0]):
        return f"autocast makes {base._family.project} hand on half precision"
    if not isinstance(module, upstream.SelfAttention):
        return None
    passed = below_model(base._signature, given)
    if getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled():
        passed.pop(CACHE, None)  # which a checkpointed layer leaves out
    return upstream.attention_call_reason(module, passed)


def _enters_in_half(base: Any, layer: torch.nn.Module, module: torch.nn.Module, first: bool) -> bool:
    """Whether a layer's rows are what autocast makes of a projection of the embeddings (ELECTRA's): until a LayerNorm
    of CUDA's makes them fp32 again, in the first layer's attention; on the CPU in all layers."""
    family = base._family
    project = getattr(base, family.project, None) if family.project else None
    weight = None if project is None else next(project.parameters(), None)
    if weight is None or not torch.is_autocast_enabled(weight.device.type):
        return False
    if not isinstance(module, modules.Output | upstream.SelfAttention):
        return False
    return weight.device.type == "cpu" or (first and module in layer.attention.modules())


def _part(path: str, module: Any, base: Any, given: dict[str, Any]) -> tuple[str, str, str]:
    """The row of a module outside the encoder tier."""
    row = _row(path, module.fused_reason(module) or _call_reason(base, module, given))
    if row[1] == "fused" and isinstance(module, upstream.SelfAttention):
        called = upstream.projections_reason(module)
        return path, "fused", f"without its projections: {called}" if called else ""
    return row


def explanation(model: torch.nn.Module, **inputs: Any) -> Explanation:
    """What `model(**inputs)` would run, without running it.

    Raises TypeError when there is no model of ours in `model`.
    """
    name, base = next(((n, m) for n, m in model.named_modules() if isinstance(m, modeling.EncoderModel)), (None, None))
    if base is None:
        raise TypeError(f"model is a {type(model).__name__}, expected one with a bert_fast model in it")
    call = _base_call(model, base, inputs)
    padding, graph = _launch(model, base, call)
    # cross-attention is called with states to attend to
    blocks = (path for path, module in model.named_modules() if getattr(module, "is_cross_attention", False))
    uncalled = () if call.given.get(CROSS_STATES) is not None else tuple(f"{path}." for path in blocks)
    inside = f"{name}." if name else ""
    parts = [
        (path, "fused", "")
        if call.reason is None and path.startswith(inside)
        else _part(path, module, base, call.given)
        for path, module in model.named_modules()
        if isinstance(module, modules.FusedModule) and not path.startswith(uncalled)
    ]
    fused = any(how == "fused" for _, how, _ in parts)
    tier = "encoder" if call.reason is None else "module" if fused else "upstream"
    return Explanation(tier, call.reason, padding, (_row(name or type(base).__name__, call.reason), *parts), graph)


def explain(model: torch.nn.Module, **inputs: Any) -> Explanation:
    """Print which tier `model(**inputs)` would take, module by module, with the reasons; returns the Explanation.

    Nothing is computed. In the module tier a module marked "fused" may still meet a tensor that it does not take (a
    dtype that an adapter gave, a mask of no known form), and then runs transformers' code for that call.
    """
    result = explanation(model, **inputs)
    print(result)
    return result
