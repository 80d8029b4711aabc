"""explain: which tier a call takes and why, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bert_fast import graphs, modeling, modules
from bert_fast.tiers import NEUTRAL_KWARGS
from bert_fast.upstream import SelfAttention


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


def explanation(model: torch.nn.Module, **inputs: Any) -> Explanation:
    """What `model(**inputs)` would run, without running it.

    Raises TypeError when there is no model of ours in `model`.
    """
    name, base = next(((n, m) for n, m in model.named_modules() if isinstance(m, modeling.EncoderModel)), (None, None))
    if base is None:
        raise TypeError(f"model is a {type(model).__name__}, expected one with a bert_fast model in it")
    known = {*base._family.parameters, *NEUTRAL_KWARGS}  # what else there is, a head keeps to itself
    of_base = inputs if base is model else {k: v for k, v in inputs.items() if k in known}
    tensors, others, kwargs = modeling.split_arguments(base._family, (), of_base)
    reason, plain = modeling.encoder_check(base, tensors, others, kwargs)
    flags = [bool(flag) for flag in modeling.output_flags(base, kwargs)]
    heads = (m for m in model.modules() if isinstance(m, modeling.FirstTokenHead) and m.base_model is base)
    head = next(heads, None)
    if type(head or model).__name__.endswith("ForMultipleChoice"):  # (B, choices, S) is (B * choices, S) to its base
        kept = {"inputs_embeds": 2}  # trailing dimensions
        tensors = {k: x if x is None else x.reshape(-1, *x.shape[-kept.get(k, 1) :]) for k, x in tensors.items()}
    first_token_only = head is not None and modeling.reads_first_token_only(head)
    padding, graph = "exact", ""
    if plain is not None:
        given = tensors["inputs_embeds"] if tensors["input_ids"] is None else tensors["input_ids"]
        B, S = (1, 1) if given is None or given.dim() < 2 else given.shape[:2]
        call = modeling.make_call(base, plain, B, S, tensors, *flags, first_token_only)
        padding = "skip" if call.skip and call.attention_mask is not None else "exact"
        graph = "" if given is None else graphs.plan(plain, call)
    rows = [_row(name or type(base).__name__, reason)]
    inside = f"{name}." if name else ""
    parts = []
    for path, module in model.named_modules():
        why_not = getattr(type(module), "fused_reason", None)
        if why_not is None:
            continue
        in_encoder = path.startswith(inside) and reason is None
        parts.append(_row(path, None if in_encoder else why_not(module)))
        if parts[-1][1] == "fused" and not in_encoder and isinstance(module, SelfAttention):
            called = modules.projections_reason(module)
            parts[-1] = (path, "fused", f"without its projections: {called}" if called else "")
    tier = "encoder" if reason is None else "module" if any(how == "fused" for _, how, _ in parts) else "upstream"
    return Explanation(tier, reason, padding, (*rows, *parts), graph)


def explain(model: torch.nn.Module, **inputs: Any) -> Explanation:
    """Print which tier `model(**inputs)` would take, module by module, with the reasons; returns the Explanation.

    Nothing is computed. In the module tier a module marked "fused" may still meet a tensor that it does not take (a
    dtype that an adapter gave, a mask of no known form), and then runs transformers' code for that call.
    """
    result = explanation(model, **inputs)
    print(result)
    return result
