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
        return getattr(hf, prefix + suffix)

    pooler = getattr(hf, f"{prefix}Pooler", None)  # ELECTRA has none
    fused = {
        cls("Embeddings"): Embeddings,
        cls("SelfAttention"): SelfAttention,
        cls("CrossAttention"): CrossAttention,
        cls("SelfOutput"): Output,
        cls("Intermediate"): Intermediate,
        cls("Output"): Output,
        **({} if pooler is None else {pooler: Pooler}),
        **changes.pop("fused", {}),
    }
    fields = {
        "model": changes.get("model") or cls("Model"),
        "outputs": BaseModelOutputWithPoolingAndCrossAttentions,
        "embeddings_class": cls("Embeddings"),
        "model_classes": changes.get("model_classes") or {"encoder": cls("Encoder")},
        "layer_classes": {
            "": cls("Layer"),
            "attention": cls("Attention"),
            "attention.self": cls("SelfAttention"),
            "attention.output": cls("SelfOutput"),
            "intermediate": cls("Intermediate"),
            "output": cls("Output"),
        },
        "pooler_class": pooler,
    }
    return Family(hf=hf, fused=fused, **(fields | changes))


def roberta_like(hf: ModuleType, prefix: str) -> Family:
    """RoBERTa's family, and those of its twins in other modeling files.

    Positions are counted from a padding row of their table on, over tokens that are not padding. Sequence
    classification reads the first token without a pooler.
    """
    classifier = f"{prefix}ForSequenceClassification"
    return bert_like(
        hf,
        prefix,
        position_padding=True,
        sequence_readers={getattr(hf, classifier): getattr(hf, f"{prefix}ClassificationHead")},
        first_token_heads=(classifier, f"{prefix}ForMultipleChoice"),
        other_heads=(f"{prefix}ForCausalLM", *(prefix + head for head in HEADS)),
    )
