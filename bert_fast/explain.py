"""explain: which tier a call takes and why, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.bert import modeling_bert as hf

from bert_fast import graphs, modeling, modules
from bert_fast.packing import resolve_padding


@dataclass(frozen=True)
class Explanation:
    """tier: "encoder" (the whole BertModel fused), "module" (transformers' forward drives, some of its modules are
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

    Raises TypeError when there is no bert_fast BertModel in `model`.
    """
    name, bert = next(
        ((n, m) for n, m in model.named_modules() if isinstance(m, modeling.BertModel)), (None, None)
    )
    if bert is None:
        raise TypeError(f"model is a {type(model).__name__}, expected a model with a bert_fast BertModel in it")
    tensors = {
        key: inputs.get(key)
        for key in ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
    }
    others = {key: inputs.get(key) for key in ("encoder_hidden_states", "encoder_attention_mask", "past_key_values")}
    known = {*tensors, *others, "use_cache"}
    if bert is not model:  # what the head keeps to itself
        known |= {"labels", "next_sentence_label", "start_positions", "end_positions", "logits_to_keep"}
    kwargs = {key: value for key, value in inputs.items() if key not in known}
    reason, plain = modeling.encoder_check(bert, tensors, others, kwargs)
    flags = [bool(flag) for flag in modeling.output_flags(bert, kwargs)]
    if isinstance(model, modeling.BertForMultipleChoice):  # (B, choices, S) is (B * choices, S) to its BertModel
        kept = {"inputs_embeds": 2}  # trailing dimensions
        tensors = {k: x if x is None else x.reshape(-1, *x.shape[-kept.get(k, 1) :]) for k, x in tensors.items()}
    first_token_only, mask = isinstance(model, modeling._FirstTokenHead), tensors["attention_mask"]
    padding, graph = "exact", ""
    if plain is not None:
        if mask is not None and mask.dim() == 2:
            padding = resolve_padding(bert.padding, first_token_only, any(flags))
        given = tensors["inputs_embeds"] if tensors["input_ids"] is None else tensors["input_ids"]
        if given is not None and given.dim() >= 2:
            call = modeling.make_call(bert, *given.shape[:2], tensors, *flags, first_token_only)
            graph = graphs.plan(bert, plain, call)
    rows = [_row(name or type(bert).__name__, reason)]
    inside = f"{name}." if name else ""
    parts = []
    for path, module in model.named_modules():
        why = next((fn(module) for cls, fn in modules.REASONS.items() if _is_swapped(module, cls)), "")
        if why != "":  # "": not a class that has a fused form
            in_encoder = path.startswith(inside) and reason is None
            parts.append(_row(path, None if in_encoder else why))
            if parts[-1][1] == "fused" and not in_encoder and isinstance(module, hf.BertSelfAttention):
                called = modules.projections_reason(module)
                parts[-1] = (path, "fused", f"without its projections: {called}" if called else "")
    tier = "encoder" if reason is None else "module" if any(how == "fused" for _, how, _ in parts) else "upstream"
    return Explanation(tier, reason, padding, (*rows, *parts), graph)


def _is_swapped(module: torch.nn.Module, cls: type) -> bool:
    """Whether `module` is of our class for `cls`, or a class made of it at run time, as FSDP does."""
    return isinstance(module, modeling.SWAPS[cls])


def explain(model: torch.nn.Module, **inputs: Any) -> Explanation:
    """Print which tier `model(**inputs)` would take, module by module, with the reasons; returns the Explanation.

    Nothing is computed. In the module tier a module marked "fused" may still meet a tensor that it does not take (a
    dtype that an adapter gave, a mask of no known form), and then runs transformers' code for that call.
    """
    result = explanation(model, **inputs)
    print(result)
    return result
