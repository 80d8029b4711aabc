"""One way to register an op: schema, CPU body, CUDA body, fake tensors, and its gradient.

`Library.define` + `impl` costs less per call than `torch.library.custom_op`, and a forward makes about a hundred calls.

A gradient is made of other ops (`register_kernel`), which have no gradient themselves and take no batched tensors: a
second derivative, and a gradient under vmap, goes through plain operators, by default those of the reference, whose
autograd also is the gradient of ops that no training runs through.

What is kept for backward is what the gradient reads, as with torch's own operators: a parameter written into meanwhile
is an error where it is read, and makes no difference where it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from bert_fast.kernels.runtime import is_batched, without_autocast

NAMESPACE = "bert_fast"
Grads = tuple[torch.Tensor | None, ...]
# (which inputs need a gradient, inputs, outputs, gradients of the outputs or None) -> gradients of the inputs or None
Gradient = Callable[[Sequence[bool], Sequence[Any], Sequence[torch.Tensor], Sequence[torch.Tensor | None]], Grads]
_library = torch.library.Library(NAMESPACE, "DEF")


class Unread(NamedTuple):
    """Stands for an input that was not kept for backward, whose numbers the gradient does not read."""

    shape: torch.Size
    dtype: torch.dtype


def register_kernel(
    schema: str, *, cpu: Callable[..., Any], cuda: Callable[..., Any] | None, fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Define `bert_fast::<schema>` without a gradient and return the callable op. cuda: None where csrc has it."""
    name = schema.split("(", 1)[0]
    _library.define(schema)
    _library.impl(name, cpu, "CPU")
    if cuda is not None:
        _library.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def register(
    schema: str,
    *,
    ref: Callable[..., Any],
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    gradient: Gradient | None = None,
    gradient_ref: Gradient | None = None,
    reads: Mapping[str, str] | None = None,
    saved_outputs: Sequence[int] = (),
) -> Callable[..., Any]:
    """Define `bert_fast::<schema>` and return the callable op.

    ref: plain PyTorch definition with the op's own arguments; its autograd, recomputed from the saved inputs, is the
    op's backward where there is no `gradient`.
    gradient: the backward; the outputs that it reads are named by position in saved_outputs, of the others it sees
    None.
    reads: inputs that it does not always read, by name: the inputs (names, spaces between) whose gradient reads them.
    Where none of these is needed, it sees Unread.
    gradient_ref: the same in plain PyTorch, reading the same: every second derivative, and gradients under vmap.
    Without it, the autograd of ref, which reads every input.
    """
    op = register_kernel(schema, cpu=cpu, cuda=cuda, fake=fake)

    def by_ref(needs: Sequence[bool], inputs: Sequence[Any], _: Sequence[Any], grads: Sequence[Any]) -> Grads:
        return tuple(gradients_of(ref, inputs, needs, grads, torch.is_grad_enabled()))

    places = {argument.name: i for i, argument in enumerate(op._schema.arguments)}
    readers = {places[name]: [places[n] for n in names.split()] for name, names in (reads or {}).items()}
    setup, backward = _autograd_of(gradient or by_ref, gradient_ref or by_ref, readers, frozenset(saved_outputs))
    torch.library.register_autograd(op.name(), backward, setup_context=setup, lib=_library)
    return op


def _autograd_of(
    gradient: Gradient, gradient_ref: Gradient, readers: Mapping[int, Sequence[int]], saved_outputs: frozenset[int]
) -> tuple[Any, Any]:
    def setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        ctx.set_materialize_grads(False)  # an output nobody used is no zero gradient to go through
        needed = {i for i, need in enumerate(ctx.needs_input_grad) if need}
        kept = list(inputs)
        for i, others in readers.items():
            if isinstance(kept[i], torch.Tensor) and needed.isdisjoint(others):
                kept[i] = Unread(kept[i].shape, kept[i].dtype)
        outputs = output if isinstance(output, tuple) else (output,)
        kept += [o if i in saved_outputs else None for i, o in enumerate(outputs)]
        ctx.save_for_backward(*(x for x in kept if isinstance(x, torch.Tensor)))
        ctx.others = [None if isinstance(x, torch.Tensor) else x for x in kept]
        ctx.is_tensor = [isinstance(x, torch.Tensor) for x in kept]
        ctx.n_inputs = len(inputs)

    def backward(ctx: Any, *grads: torch.Tensor | None) -> Grads:
        saved = iter(ctx.saved_tensors)
        args = [next(saved) if is_tensor else x for is_tensor, x in zip(ctx.is_tensor, ctx.others, strict=True)]
        inputs, outputs = args[: ctx.n_inputs], args[ctx.n_inputs :]
        # torch does not count trailing arguments that were left at their defaults
        needs = (*ctx.needs_input_grad, *[False] * (len(inputs) - len(ctx.needs_input_grad)))
        used = next((g for g in grads if g is not None), None)
        if used is None:
            return (None,) * len(inputs)
        plainly = torch.is_grad_enabled() or is_batched(grads)
        with without_autocast(used.device.type):
            return (gradient_ref if plainly else gradient)(needs, inputs, outputs, grads)

    return setup, backward


def gradients_of(
    ref: Callable[..., Any],
    args: Sequence[Any],
    needs: Sequence[bool],
    grads: Sequence[torch.Tensor | None],
    create_graph: bool = False,
) -> list[torch.Tensor | None]:
    """Gradients of `ref(*args)` by autograd, one per argument, None where not in need.

    grads: of its outputs, None for those not used. create_graph: for a second derivative the result stays connected to
    args, but through a view of each: one argument may have been computed from another (x from the residual), and that
    path is not ref's to differentiate. So it does under torch.func, which allows no new leaf.
    """
    connected = create_graph or torch._C._functorch.peek_interpreter_stack() is not None
    # an op's CPU body may run where autograd is switched off, below a traced graph or a TorchDispatchMode: leaving
    # inference mode switches it on again
    with torch.inference_mode(False), torch.enable_grad():
        args = [
            a if not need else a.view_as(a) if connected else a.detach().requires_grad_()
            for a, need in zip(args, needs, strict=True)
        ]
        out = ref(*args)
    outputs = out if isinstance(out, tuple) else (out,)
    pairs = [
        (o, g)
        for o, g in zip(outputs, grads, strict=True)
        if g is not None and o.requires_grad and o.numel()  # an integer output requires none
    ]
    wanted = [a for a, need in zip(args, needs, strict=True) if need]
    if not pairs or not wanted:
        return [None] * len(args)
    results, weights = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(results, wanted, weights, allow_unused=True, create_graph=create_graph))
    return [next(found) if need else None for need in needs]
