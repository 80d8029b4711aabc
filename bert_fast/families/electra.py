"""ELECTRA (Clark et al. 2020): BERT without a pooler, with embeddings of a size of their own and a dense after them."""

from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.electra import modeling_electra as hf

from bert_fast.families.layout import HEADS, bert_like
from bert_fast.modeling import derive

ELECTRA = bert_like(
    hf,
    "Electra",
    outputs=BaseModelOutputWithPastAndCrossAttentions,
    project="embeddings_project",
    sequence_readers={hf.ElectraForSequenceClassification: hf.ElectraClassificationHead},
    first_token_heads=("ElectraForSequenceClassification",),
    # ForMultipleChoice summarises as the config says, not always by the first token
    other_heads=tuple(f"Electra{head}" for head in (*HEADS, "ForPreTraining", "ForCausalLM", "ForMultipleChoice")),
)
globals().update(derive(ELECTRA, __name__))
