"""One way to register an op: schema, CPU body, CUDA body, fake tensors, and a gradient from the reference.

`Library.define` + `impl` costs less per call than `torch.library.custom_op`, and a forward makes about a hundred calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

NAMESPACE = "bert_fast"
_library = torch.library.Library(NAMESPACE, "DEF")


def register(
    schema: str,
    *,
    ref: Callable[..., Any],
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
) -> Callable[..., Any]:
    """Define `bert_fast::<schema>` and return the callable op.

    ref: plain PyTorch definition with the op's own arguments; its autograd is the op's backward, recomputed from the
    saved inputs, so nothing but inputs is kept. Second derivatives go through the same reference.
    """
    name = schema.split("(", 1)[0]
    qualname = f"{NAMESPACE}::{name}"
    _library.define(schema)
    _library.impl(name, cpu, "CPU")
    _library.impl(name, cuda, "CUDA")
    torch.library.register_fake(qualname, fake, lib=_library)
    torch.library.register_autograd(qualname, _backward_of(ref), setup_context=_setup_context, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    ctx.set_materialize_grads(False)  # an output nobody used is no zero gradient to go through
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, torch.Tensor)))
    ctx.others = [None if isinstance(x, torch.Tensor) else x for x in inputs]
    ctx.is_tensor = [isinstance(x, torch.Tensor) for x in inputs]
    outputs = output if isinstance(output, tuple) else (output,)
    ctx.differentiable = [o.is_floating_point() for o in outputs]


def _backward_of(ref: Callable[..., Any]) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        args = [next(saved) if is_tensor else x for is_tensor, x in zip(ctx.is_tensor, ctx.others, strict=True)]
        needs = [i for i, need in enumerate(ctx.needs_input_grad) if need]
        # For a double backward stay connected to the saved tensors, but through a view of each: one saved tensor may
        # have been computed from another (x from the residual), and that path is not this op's to differentiate.
        create_graph = torch.is_grad_enabled()
        for i in needs:
            args[i] = args[i].view_as(args[i]) if create_graph else args[i].detach().requires_grad_()
        with torch.enable_grad():
            out = ref(*args)
        outputs = out if isinstance(out, tuple) else (out,)
        pairs = [
            (o, g)
            for o, g, ok in zip(outputs, grads, ctx.differentiable, strict=True)
            if ok and g is not None and o.requires_grad and o.numel()
        ]
        result: list[torch.Tensor | None] = [None] * len(args)
        if pairs:
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [args[i] for i in needs],
                [g for _, g in pairs],
                allow_unused=True,
                create_graph=create_graph,
            )
            for i, grad in zip(needs, found, strict=True):
                result[i] = grad
        return tuple(result)

    return backward
