"""What of a family's files can be checked by reading alone: argument names, their defaults, options of the config.

Such drift a comparison of tiny models cannot show: an argument that nobody gave, an option that is off by default.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from bert_fast.family import Family
from bert_fast.installed import FLAGS, INPUTS, WITHOUT_EFFECT, Signature

# what the encoders of the tested releases read of their configs
_KNOWN_OPTIONS = frozenset(
    (
        *("_attn_implementation", "activation", "add_cross_attention", "attention_dropout", *FLAGS, *WITHOUT_EFFECT),
        *("attention_probs_dropout_prob", "chunk_size_feed_forward", "classifier_dropout", "dim", "dropout"),
        *("embedding_size", "hidden_act", "hidden_dim", "hidden_dropout_prob", "hidden_size", "intermediate_size"),
        *("is_decoder", "is_encoder_decoder", "layer_norm_eps", "max_position_embeddings", "n_heads", "n_layers"),
        *("num_attention_heads", "num_hidden_layers", "num_labels", "pad_token_id", "problem_type"),
        *("relative_attention_num_buckets", "seq_classif_dropout", "sinusoidal_pos_embds", "type_vocab_size"),
        "vocab_size",
    )
)
_OPTION = re.compile(r"""\bconfig(?:\.(\w+)|, *["'](\w+)["'])""")  # config.name, getattr(config, "name")
_BLOCK = re.compile(r"^(?=class |def |@)", re.MULTILINE)


def undeclared(family: Family, model: nn.Module) -> Iterator[str]:
    """What the files of a family do not declare as we take it; model: one of transformers'."""
    cls = family.model.__name__
    inputs = set(INPUTS)
    if not hasattr(model.embeddings, "token_type_embeddings"):
        inputs.discard(INPUTS.token_type_ids)
    for name in sorted(inputs - family.signature.inputs):
        yield f"{cls} has no argument {name!r}"
    classes = [own for own in family.forwards if not own.__module__.startswith("torch.")]
    for own in classes:
        name = Signature(own.forward).unexpected_default()
        if name is not None:
            yield f"{own.__name__} has another default of {name!r}"
    sources = {name: _classes(Path(str(sys.modules[name].__file__))) for name in {own.__module__ for own in classes}}
    for own in classes:
        read = {a or b for a, b in _OPTION.findall(sources[own.__module__].get(own.__name__, ""))}
        for name in sorted(read - _KNOWN_OPTIONS):
            yield f"{own.__name__} reads config.{name}, which no tested release does"


def _classes(path: Path) -> dict[str, str]:
    """The text of every class in a file; what follows one belongs to it up to the next class, function or decorator."""
    blocks = _BLOCK.split(path.read_text(encoding="utf-8"))
    return {block[6:].split("(")[0].split(":")[0].strip(): block for block in blocks if block.startswith("class ")}
