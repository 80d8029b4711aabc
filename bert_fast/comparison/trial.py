"""The calls in which a tiny model on our classes is compared with transformers' own, for one family.

On both tiers: our model's own call, and transformers' forward on it, where each fused module runs by itself. Compared
is what our code takes for granted of a release: every argument that we serve, both attention implementations, what is
returned, gradients, a prefix cache. Of dropout, heads, decoders and activations: trial_parts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from bert_fast.comparison.twins import HEADS, HIDDEN, POSITIONS, TYPES, VOCABULARY, build, tiny_config, twin
from bert_fast.comparison.wording import gradient_difference, output_difference
from bert_fast.family import Family
from bert_fast.installed import (
    ATTENTIONS,
    CACHE,
    CACHE_LENGTH,
    HIDDEN_STATES,
    INPUTS,
    RETURN_DICT,
    WITHOUT_EFFECT,
    model_arguments,
)
from bert_fast.modeling import encoder_check

Tensor = torch.Tensor
B, S, PAST = 3, 5, 2
_HOLES = [[1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
_WITH_EMPTY = [[0, 0, 0, 0, 0], [1, 0, 1, 1, 1], [0, 0, 1, 1, 1]]
_COLLECTED = {HIDDEN_STATES: True, ATTENTIONS: True}


class Inputs:
    """Tensors of a call, the same ones every time."""

    def __init__(self, embedding_size: int, padding: int) -> None:
        generator = torch.Generator().manual_seed(1)

        def below(n: int, *shape: int) -> Tensor:
            return torch.randint(n, shape, generator=generator, device="cpu")

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)

        self.holes = torch.tensor(_HOLES, device="cpu")
        self.with_empty = torch.tensor(_WITH_EMPTY, device="cpu")
        self.ids = below(VOCABULARY - 3, B, S) + 3
        self.ids = self.ids.masked_fill(self.with_empty == 0, padding)
        self.types = below(TYPES, B, S)
        self.positions = below(POSITIONS - 2, B, S) + 2
        self.embeds = normal(B, S, embedding_size)
        self.keep = (below(2, B, HEADS, S, S) + torch.eye(S, dtype=torch.long, device="cpu")).bool()
        lowest = torch.finfo(torch.float32).min
        self.kept = torch.zeros(B, HEADS, S, S, device="cpu", dtype=torch.float32).masked_fill(~self.keep, lowest)
        self.bias = normal(B, HEADS, S, S) + self.kept / 2
        self.states = normal(B, S + 1, HIDDEN)
        self.prefix = [normal(2, B, HEADS, PAST, HIDDEN // HEADS) for _ in range(2)]

    def cache(self) -> Any:
        """A new one with a prefix in every layer, as PEFT's prefix tuning gives it."""
        from transformers.cache_utils import DynamicCache  # one that is gone is a difference, not the end of bert_fast

        cache = DynamicCache()
        for i, (keys, values) in enumerate(self.prefix):
            cache.update(keys.clone(), values.clone(), i)
        return cache


class Case(NamedTuple):
    """One call.

    wanted: what transformers' model is given instead; as_eager: that one is eager, since sdpa keeps no weights;
    prefix: with a cache, and so on the module tier alone; whole_only: on the encoder tier alone, for time.
    """

    given: dict[str, Any]
    wanted: dict[str, Any] | None = None
    as_eager: bool = False
    prefix: bool = False
    whole_only: bool = False


def whole(model: Any, given: dict[str, Any]) -> Any:
    """A call of one of our models on the encoder tier."""
    arguments = model_arguments(model._signature, model.config, (), given)
    reason = "its arguments do not fit" if arguments is None else encoder_check(model, arguments)[0]
    if reason is not None:
        raise RuntimeError(f"not fused: {reason}")
    return model(**given)


def by_modules(model: Any, given: dict[str, Any]) -> Any:
    """The same call on the module tier."""
    return model._upstream.forward(model, **given)


_TIERS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {"": whole, ", module by module": by_modules}


class Trial:
    """A model of transformers' and its twin, and the calls that both answer.

    Their config says that all is dropped out, their modules say that nothing is: what transformers drops by another
    way than these modules shows in training, and nothing is drawn.
    """

    def __init__(self, family: Family) -> None:
        self.family, self._name = family, family.model.__name__
        self.kinds = ("eager", "sdpa") if family.model._supports_sdpa else ("eager",)
        self.upstream = build(family.model, tiny_config(family, dropout=1.0, attn_implementation="eager"))
        self.views = [family.layer_view(layer) for layer in family.layers_of(self.upstream)]
        set_rate((*self.dropouts_of_weights(), *self.other_dropouts()), 0.0)
        self.ours = twin(self.upstream)
        config = self.upstream.config
        self.inputs = Inputs(self.upstream.embeddings.word_embeddings.weight.shape[1], config.pad_token_id)
        self._has_types = INPUTS.token_type_ids in family.signature.inputs

    def dropouts_of_weights(self) -> list[Any]:
        return [view.attention.dropout for view in self.views]

    def other_dropouts(self) -> list[Any]:
        within = [part for view in self.views for part in (view.attention_dropout, view.dropout) if part is not None]
        return [self.upstream.embeddings.dropout, *within]

    def _types(self) -> dict[str, Tensor]:
        return {INPUTS.token_type_ids: self.inputs.types} if self._has_types else {}

    def _cases(self, kind: str) -> Iterator[Case]:
        x, mask, ids = self.inputs, INPUTS.attention_mask, {INPUTS.input_ids: self.inputs.ids}
        yield Case(ids, whole_only=True)
        first = {**ids, mask: x.with_empty, **self._types(), INPUTS.position_ids: x.positions[:1]}
        yield Case(first | {RETURN_DICT: False} | (_COLLECTED if kind == "eager" else {HIDDEN_STATES: True}))
        embeds = {INPUTS.inputs_embeds: x.embeds, mask: x.bias, HIDDEN_STATES: [0, -1]}
        without_effect = {self.family.signature.spelled.get(name, name): 1 for name in WITHOUT_EFFECT}
        yield Case(embeds | without_effect, whole_only=kind == "sdpa")
        # a bool mask says what to keep under eager too, where transformers would add it as 0 and 1
        odd = {INPUTS.input_ids: x.ids.int(), INPUTS.position_ids: x.positions, HIDDEN_STATES: 1}
        yield Case(odd | {mask: x.keep}, odd | {mask: x.kept} if kind == "eager" else None, whole_only=True)
        if kind == "sdpa":
            yield Case({**ids, mask: x.holes.float()} | _COLLECTED, as_eager=True)
        if kind == self.kinds[-1] and CACHE in self.family.signature.spelled:
            prefixed = torch.cat([x.holes.new_ones(B, PAST), x.holes], 1)
            yield Case({**ids, mask: prefixed, **_COLLECTED}, as_eager=True, prefix=True)

    def of_calls(self, kind: str) -> Iterator[str]:
        """Where outputs differ under an attention implementation."""
        for case in self._cases(kind):
            with torch.no_grad():
                self._attend("eager" if case.as_eager else kind, kind)
                expected = self._called(case, case.wanted or case.given, self.upstream)
                for tier, call in _TIERS.items():
                    if case.prefix if call is whole else case.whole_only:
                        continue
                    found = output_difference(self._called(case, case.given, self.ours, call), expected)
                    if found is not None:
                        yield f"{self._name}({self._told(case)}) under {kind}{tier}: {found}"

    def of_gradients(self) -> Iterator[str]:
        """Where a step of training differs, without dropout."""
        given = {INPUTS.input_ids: self.inputs.ids, INPUTS.attention_mask: self.inputs.holes, **self._types()}
        case = Case(given | _COLLECTED)
        self._attend("eager", "eager")
        expected, wanted = _trained(self.upstream, lambda model, given: model(**given), case)
        out, gradients = _trained(self.ours, whole, case)
        found = output_difference(out, expected) or gradient_difference(gradients, wanted)
        if found is not None:
            yield f"{self._name}({self._told(case)}) in training: {found}"

    def of_embeddings(self) -> Iterator[str]:
        """Where the embeddings differ by themselves."""
        x, ours = self.inputs, self.ours.embeddings
        ids, embeds = {INPUTS.input_ids: x.ids}, {INPUTS.inputs_embeds: x.embeds}
        calls = [ids, ids | embeds | {INPUTS.position_ids: x.positions}]
        past = ours._signature.spelled.get(CACHE_LENGTH)
        if past is not None:
            calls += [{**ids, past: PAST}, {**ids, **self._types(), past: PAST}]
        for given in calls:
            with torch.no_grad():
                found = output_difference(ours(**given), self.upstream.embeddings(**given))
            if found is not None:
                yield f"{ours._upstream.__name__}({', '.join(given)}): {found}"

    def _attend(self, upstream: str, ours: str) -> None:
        for model, kind in ((self.upstream, upstream), (self.ours, ours)):
            model.config._attn_implementation = kind

    def _called(self, case: Case, given: dict[str, Any], model: Any, call: Any = None) -> Any:
        if case.prefix:
            given = given | {self.family.signature.spelled[CACHE]: self.inputs.cache()}
        return model(**given) if call is None else call(model, given)

    def _told(self, case: Case) -> str:
        cache = [self.family.signature.spelled[CACHE]] if case.prefix else []
        return ", ".join([*case.given, *cache])


def _trained(model: Any, call: Callable[[Any, dict[str, Any]], Any], case: Case) -> tuple[Any, dict[str, Any]]:
    """(outputs, gradients by parameter) of one step, from all outputs."""
    model.train()
    outputs = call(model, case.given)
    tensors = [x for value in outputs.values() for x in (value if isinstance(value, tuple) else (value,))]
    loss = sum((x * _slope(x)).sum() for x in tensors if x is not None and x.requires_grad)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    model.eval()
    return outputs, dict(zip(names, gradients, strict=True))


def _slope(x: Tensor) -> Tensor:
    """Another number for every element."""
    return (torch.arange(x.numel(), device="cpu", dtype=torch.float32) / x.numel() - 0.3).view(x.shape)


def set_rate(dropouts: Iterable[Any], rate: float) -> None:
    for module in dropouts:
        module.p = rate
