"""sentence-transformers: `encode` may skip padding, where its pooling reads real tokens only.

Imported by `accelerate` when sentence_transformers is; never by bert_fast itself.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import sentence_transformers
from sentence_transformers.sentence_transformer import modules as st
from torch import nn

from bert_fast.family import UPSTREAM
from bert_fast.modeling import SIBLINGS, EncoderModel, add_swap
from bert_fast.packing import only_real_tokens_are_read

_ENCODE = inspect.signature(sentence_transformers.SentenceTransformer.encode)
# modules that may follow the pooling: they read the sentence's embedding
_AFTER_POOLING = (st.Normalize, st.Dense, st.LayerNorm, st.Dropout)


def _is_plain(module: nn.Module, *classes: type) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return type(module) in classes and not hooked


def pools_real_tokens(model: nn.Module) -> bool:
    """Whether nothing but masked pooling reads the token embeddings: a transformer, its pooling, what reads that."""
    modules = list(model)
    if len(modules) < 2 or not _is_plain(model, SIBLINGS[sentence_transformers.SentenceTransformer]):
        return False
    transformer, pooling, *rest = modules
    return (
        _is_plain(transformer, st.Transformer)
        and isinstance(transformer.model, EncoderModel)
        and _is_plain(transformer.model, *UPSTREAM)
        and _is_plain(pooling, st.Pooling)
        and all(_is_plain(module, *_AFTER_POOLING) for module in rest)
        and all(getattr(m, "module_input_name", "sentence_embedding") == "sentence_embedding" for m in rest)
    )


class SentenceTransformer(sentence_transformers.SentenceTransformer):
    @functools.wraps(sentence_transformers.SentenceTransformer.encode)
    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """padding="auto" skips padding where only the pooling could see it."""
        given = _ENCODE.bind_partial(self, *args, **kwargs).arguments
        unseen = given.get("output_value", "sentence_embedding") == "sentence_embedding" and pools_real_tokens(self)
        with only_real_tokens_are_read(unseen):
            return super().encode(*args, **kwargs)


add_swap(sentence_transformers.SentenceTransformer, SentenceTransformer)
