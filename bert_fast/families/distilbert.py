"""DistilBERT (Sanh et al. 2019): post-norm layers like BERT's under other names, no token types, no pooler.

The output projection belongs to the attention module and has no dropout of its own; heads read the first token.
"""

from transformers.modeling_outputs import BaseModelOutput
from transformers.models.distilbert import modeling_distilbert as hf

from bert_fast.families.layout import HEADS
from bert_fast.family import Family, LayerNames
from bert_fast.modeling import derive
from bert_fast.modules import Embeddings as FusedEmbeddings
from bert_fast.modules import FeedForward
from bert_fast.upstream import ProjectedSelfAttention

DISTILBERT = Family(
    hf=hf,
    model=hf.DistilBertModel,
    outputs=BaseModelOutput,
    embeddings_class=hf.Embeddings,
    model_classes={"transformer": hf.Transformer},
    layer_classes={"": hf.TransformerBlock, "attention": hf.DistilBertSelfAttention, "ffn": hf.FFN},
    names=LayerNames(
        *("attention", "q_lin", "k_lin", "v_lin"),
        attention_dense="attention.out_lin",
        attention_dropout=None,
        attention_norm="sa_layer_norm",
        up="ffn.lin1",
        act="ffn.activation",
        down="ffn.lin2",
        dropout="ffn.dropout",
        norm="output_layer_norm",
    ),
    layers="transformer.layer",
    heads="n_heads",
    ids_before_embeds=True,
    fused={
        hf.Embeddings: FusedEmbeddings,
        hf.DistilBertSelfAttention: ProjectedSelfAttention,
        hf.FFN: FeedForward,
    },
    first_token_heads=("DistilBertForSequenceClassification", "DistilBertForMultipleChoice"),
    other_heads=tuple(f"DistilBert{head}" for head in HEADS),
)
globals().update(derive(DISTILBERT, __name__))
