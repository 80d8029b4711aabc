"""BertGeneration (Rothe et al. 2019) as an encoder: BERT without token types and pooler."""

from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bert_generation import modeling_bert_generation as hf

from bert_fast.families.layout import bert_like
from bert_fast.modeling import derive

BERT_GENERATION = bert_like(
    hf,
    "BertGeneration",
    model=hf.BertGenerationEncoder,
    outputs=BaseModelOutputWithPastAndCrossAttentions,
    model_classes={"encoder": hf.BertEncoder},
    other_heads=("BertGenerationDecoder",),
)
globals().update(derive(BERT_GENERATION, __name__))
