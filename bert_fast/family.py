"""What a family of models is: where transformers keeps the parts that our ops read, and a view of one model's.

A `Family` is written down once for an architecture (families/) by names. `view` follows the names in one model and
gives the parts themselves; everything that computes (encoder.py, training.py, folded.py, one_launch.py) sees views
only, so that no line of it knows an architecture.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import starmap
from operator import attrgetter
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from bert_fast.installed import Signature

UPSTREAM: dict[type, type] = {}  # class of ours -> transformers' class that it stands for
FAMILIES: list[Family] = []  # in order of their import

# methods that transformers' forwards call of their own module, where a class has them
METHODS = ("feed_forward_chunk", "ff_chunk", "compute_position_bias", "relative_position_bucket")
METHODS += ("create_position_ids_from_input_ids", "create_position_ids_from_inputs_embeds")


class LayerNames(NamedTuple):
    """Dotted paths of the parts of a layer. BERT's are the defaults."""

    attention: str = "attention.self"  # whose forward attends; its query, key and value are named below it
    query: str = "query"
    key: str = "key"
    value: str = "value"
    attention_dense: str = "attention.output.dense"
    attention_dropout: str | None = "attention.output.dropout"  # None: there is none
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    act: str = "intermediate.intermediate_act_fn"
    down: str = "output.dense"
    dropout: str = "output.dropout"
    norm: str = "output.LayerNorm"


class EmbeddingsView(NamedTuple):
    """module: the embeddings; types: the table of token types or None; project: a dense after them or None.

    positions(input_ids, inputs_embeds): the default positions (B, S) where they depend on the input, else None.
    checked: what checks.py found good, the buffers of positions and token types up to a length.
    """

    module: nn.Module
    word: nn.Embedding
    position: nn.Embedding
    types: nn.Embedding | None
    norm: nn.LayerNorm
    dropout: nn.Dropout
    project: nn.Linear | None
    positions: Callable[[torch.Tensor | None, torch.Tensor | None], torch.Tensor] | None
    checked: dict[tuple[int, bool], tuple[int, ...]]


class LayerView(NamedTuple):
    """The parts of one layer. scale: of the scores; dropout_owner: whose training flag the weights' dropout obeys."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_dense: nn.Linear
    attention_dropout: nn.Dropout | None
    attention_norm: nn.LayerNorm
    up: nn.Linear
    act: nn.Module
    down: nn.Linear
    dropout: nn.Dropout
    norm: nn.LayerNorm
    attention: nn.Module
    dropout_owner: nn.Module
    heads: int
    scale: float


class ModelView(NamedTuple):
    """The parts of one model; pooler: its dense, or None.

    relative_bias(S): what the encoder adds to all scores, (1, heads, S, S), or None: nothing.
    """

    embeddings: EmbeddingsView
    layers: list[LayerView]
    pooler: nn.Linear | None
    hidden: int
    heads: int
    relative_bias: Callable[[int], torch.Tensor] | None
    uniform_empty: bool  # a sequence without a key has uniform weights (as eager's), not a context of zeros (sdpa)


@dataclass(frozen=True, eq=False)
class Family:
    """One architecture of transformers.

    hf: its modeling file; model: its base model; outputs: what that returns. Classes by path: model_classes those of
    the model's modules that only contain others, layer_classes those within a layer ("" the layer itself).
    """

    hf: ModuleType
    model: type
    outputs: type
    embeddings_class: type
    model_classes: dict[str, type]
    layer_classes: dict[str, type]
    pooler_class: type | None = None
    names: LayerNames = field(default_factory=LayerNames)
    layers: str = "encoder.layer"
    heads: str = "num_attention_heads"  # attribute of the attention module
    position_padding: bool = False  # positions count from a padding row of their table on, as RoBERTa's do
    dropout_is_called: bool = False  # the weights' dropout is a module that is called, not one whose p is read
    ids_before_embeds: bool = False  # given both, the embeddings take the ids, as DistilBERT's do
    relative_positions: bool = False  # the encoder adds a bias to all scores (MPNet)
    scaling: str | None = "scaling"  # attribute of the attention module; None: 1 / sqrt(head_dim)
    project: str | None = None  # name of a dense after the embeddings (ELECTRA)
    own_outputs: bool = False  # its forward collects outputs itself: flags by truth, None kept in the tuple (MPNet)
    fused: dict[type, type] = field(default_factory=dict)  # class of transformers -> what modules.py puts before it
    first_token_heads: tuple[str, ...] = ()  # names of heads that read the first token only
    other_heads: tuple[str, ...] = ()
    # first_token_heads that hand on the whole sequence -> the class of their `classifier`, which reads the first token
    sequence_readers: dict[type, type] = field(default_factory=dict)
    derived: list[type] = field(default_factory=list)  # our classes of it (modeling.derive)

    compare: ClassVar[Callable[[Family], str | None] | None] = None  # comparison.py's, on releases that nobody tested

    def difference(self) -> str | None:
        """How the installed transformers computes something else than we do."""
        return None if self.compare is None else self.compare()

    @cached_property
    def signature(self) -> Signature:
        """The arguments of the model."""
        return Signature(self.model.forward)

    @cached_property
    def returns_cross_attentions(self) -> bool:
        """An encoder asked for attentions returns an empty tuple of these too."""
        return "cross_attentions" in (getattr(self.model, "_can_record_outputs", None) or {})

    @cached_property
    def functions(self) -> tuple[Any, ...]:
        """What a forward calls beside the forwards of modules, as it was when first asked for."""
        return self.current_functions()

    @cached_property
    def _methods(self) -> list[tuple[type, str]]:
        classes = (self.embeddings_class, *self.model_classes.values(), *self.layer_classes.values())
        return [(cls, name) for cls in classes for name in METHODS if hasattr(cls, name)]

    def current_functions(self) -> tuple[Any, ...]:
        hf = self.hf
        return (
            getattr(hf, "eager_attention_forward", None),
            hf.create_bidirectional_mask,
            getattr(hf, "ALL_ATTENTION_FUNCTIONS", {}).get("sdpa"),
            *starmap(getattr, self._methods),
        )

    @cached_property
    def forwards(self) -> dict[type, Any]:
        """What a call of each class of a model runs, as imported."""
        classes = {
            *(self.model, self.embeddings_class, *self.model_classes.values(), *self.layer_classes.values()),
            *(*self.fused, self.pooler_class, *self.sequence_readers.values()),
            *(getattr(self.hf, name) for name in self.first_token_heads),
            *(nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.Tanh),
        }
        return {cls: cls.forward for cls in classes - {None}}

    @cached_property
    def _layers_of(self) -> Callable[[Any], Any]:
        return attrgetter(self.layers)

    def pooler_of(self, model: nn.Module) -> nn.Module | None:
        return None if self.pooler_class is None else model.pooler

    def layers_of(self, model: nn.Module) -> nn.ModuleList:
        return self._layers_of(model)

    @cached_property
    def _parts(self) -> tuple[Callable[[Any], Any] | None, ...]:
        names = self.names
        within = [f"{names.attention}.{name}" for name in names[1:4]]
        return tuple(None if path is None else attrgetter(path) for path in (*within, *names[4:], names.attention))

    def layer_view(self, layer: nn.Module) -> LayerView:
        """Raises AttributeError where a part is missing."""
        parts = [None if part is None else part(layer) for part in self._parts]
        own = parts[-1]
        owner = own.dropout if self.dropout_is_called else own
        return LayerView(*parts, owner, getattr(own, self.heads), self.scale(own))

    def scale(self, own: nn.Module) -> float:
        """Factor of the scores of an attention module."""
        return getattr(own, self.scaling) if self.scaling else own.attention_head_size**-0.5

    def embeddings_view(self, model: nn.Module) -> EmbeddingsView:
        module = model.embeddings

        def positions(input_ids: torch.Tensor | None, embeds: torch.Tensor | None) -> torch.Tensor:
            return self.positions(module, input_ids, embeds)

        return EmbeddingsView(
            module, module.word_embeddings, module.position_embeddings, getattr(module, "token_type_embeddings", None),
            module.LayerNorm, module.dropout, getattr(model, self.project, None) if self.project else None,
            positions if self.position_padding else None, {},
        )  # fmt: skip

    def positions(
        self, module: nn.Module, input_ids: torch.Tensor | None, embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """transformers' own default positions of a family with position_padding, (B, S)."""
        if input_ids is None:
            of_embeds = module.create_position_ids_from_inputs_embeds
            args = (module.padding_idx,) if len(inspect.signature(of_embeds).parameters) == 2 else ()
            return of_embeds(embeds, *args)
        of_ids = getattr(module, "create_position_ids_from_input_ids", None)
        return (of_ids or self.hf.create_position_ids_from_input_ids)(input_ids, module.padding_idx)

    def view(self, model: nn.Module) -> ModelView:
        """The parts of a model whose modules are plain."""
        layers = [self.layer_view(layer) for layer in self.layers_of(model)]
        pooler = self.pooler_of(model)
        return ModelView(
            self.embeddings_view(model), layers, None if pooler is None else pooler.dense,
            layers[0].norm.weight.shape[0], layers[0].heads,
            relative_bias(model.encoder) if self.relative_positions else None,
            model.config._attn_implementation != "sdpa",
        )  # fmt: skip


def relative_bias(encoder: nn.Module) -> Callable[[int], torch.Tensor]:
    """MPNetEncoder's own bias of the scores, for one sequence of a length."""

    def of_length(S: int) -> torch.Tensor:
        return encoder.compute_position_bias(encoder.relative_attention_bias.weight.new_empty(1, S, 0))

    return of_length


def family_of(model: nn.Module) -> Family:
    """Of one of our models or modules (or a class made of one at run time)."""
    return type(model)._family
