"""MPNet (Song et al. 2020): BERT's layers under other names, and a bias of all scores by relative position.

The bias is a gather for the whole batch, which the kernels read as they read a 4-D mask; padding is computed.
"""

from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.mpnet import modeling_mpnet as hf

from bert_fast.families.layout import HEADS
from bert_fast.family import Family, LayerNames
from bert_fast.modeling import derive
from bert_fast.modules import Embeddings, Intermediate, Output, Pooler
from bert_fast.upstream import OwnAttention

MPNET = Family(
    hf=hf,
    model=hf.MPNetModel,
    outputs=BaseModelOutputWithPooling,
    embeddings_class=hf.MPNetEmbeddings,
    model_classes={"encoder": hf.MPNetEncoder},
    layer_classes={
        "": hf.MPNetLayer,
        "attention": hf.MPNetAttention,
        "attention.attn": hf.MPNetSelfAttention,
        "intermediate": hf.MPNetIntermediate,
        "output": hf.MPNetOutput,
    },
    pooler_class=hf.MPNetPooler,
    names=LayerNames(
        *("attention.attn", "q", "k", "v"),
        attention_dense="attention.attn.o",
        attention_dropout="attention.dropout",
        attention_norm="attention.LayerNorm",
    ),
    position_padding=True,
    dropout_is_called=True,
    relative_positions=True,
    scaling=None,
    own_outputs=True,
    fused={
        hf.MPNetEmbeddings: Embeddings,
        hf.MPNetSelfAttention: OwnAttention,
        hf.MPNetIntermediate: Intermediate,
        hf.MPNetOutput: Output,
        hf.MPNetPooler: Pooler,
    },
    # those that read the first token too: the bias has a row for every query, so that all are computed
    other_heads=("MPNetForSequenceClassification", "MPNetForMultipleChoice", *(f"MPNet{head}" for head in HEADS)),
)
globals().update(derive(MPNET, __name__))
