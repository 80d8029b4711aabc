"""One checked call of the encoder tier, launched op by op: which form of the forward it takes."""

from __future__ import annotations

import torch

from bert_fast.encoder import Encoded, encode
from bert_fast.folded import encode_folded, folded_reason
from bert_fast.graphs import Call
from bert_fast.one_launch import encode_in_one_launch, is_forced, one_launch_reason
from bert_fast.packing import make_packing, relative_mask
from bert_fast.snapshot import Snapshot
from bert_fast.training import encode_training


def _hides_keys(mask: torch.Tensor | None) -> bool:
    """Whether transformers makes an additive mask of this one; looked up on the CPU alone, where it matters."""
    return mask is not None and (mask.dim() == 4 or not mask.is_cpu or not bool((mask != 0).all()))


def run_directly(call: Call, snapshot: Snapshot) -> Encoded:
    """training.py where there may be gradients, dropout or autocast; else encoder.py, or one of its other forms."""
    device, view, given = snapshot.device, snapshot.view, call.attention_mask
    mask = given if view.relative_bias is None else relative_mask(view.relative_bias(call.S), given)
    packing = make_packing(mask, call.B, call.S, device, call.skip, view.uniform_empty)
    inputs = call.input_ids, call.token_type_ids, call.position_ids, call.inputs_embeds
    if torch.is_grad_enabled() or snapshot.training or torch.is_autocast_enabled(device.type):
        masked = call.attentions and _hides_keys(given)
        return encode_training(view, packing, *inputs, call.hidden, call.attentions, masked)
    run = encode_folded if folded_reason(view, packing, snapshot.dtype, device) is None else encode
    if is_forced() and packing.bias is None:
        if one_launch_reason(view, call.B, call.S, snapshot.dtype, device) is None:
            run = encode_in_one_launch
    return run(view, packing, *inputs, call.hidden, call.attentions, call.first_tokens_only)
