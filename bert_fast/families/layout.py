"""The layout that most of transformers' encoders share: BERT's, under another prefix."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from bert_fast.family import Family
from bert_fast.modules import Embeddings, Intermediate, Output, Pooler
from bert_fast.upstream import CrossAttention, SelfAttention

HEADS = ("ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering")


def bert_like(hf: ModuleType, prefix: str, **changes: Any) -> Family:
    """The family of a modeling file whose classes are BERT's with `prefix` in place of "Bert".

    changes: fields of Family that differ; of `fused`, what is added.
    """

    def cls(suffix: str) -> Any:
        return getattr(hf, prefix + suffix, None)

    fused = {
        cls("Embeddings"): Embeddings,
        cls("SelfAttention"): SelfAttention,
        cls("CrossAttention"): CrossAttention,
        cls("SelfOutput"): Output,
        cls("Intermediate"): Intermediate,
        cls("Output"): Output,
        **({cls("Pooler"): Pooler} if cls("Pooler") else {}),
        **changes.pop("fused", {}),
    }
    fields = {
        "model": cls("Model"),
        "outputs": BaseModelOutputWithPoolingAndCrossAttentions,
        "embeddings_class": cls("Embeddings"),
        "model_classes": {"encoder": cls("Encoder")},
        "layer_classes": {
            "": cls("Layer"),
            "attention": cls("Attention"),
            "attention.self": cls("SelfAttention"),
            "attention.output": cls("SelfOutput"),
            "intermediate": cls("Intermediate"),
            "output": cls("Output"),
        },
        "pooler_class": cls("Pooler"),
    }
    return Family(hf=hf, fused=fused, **(fields | changes))
