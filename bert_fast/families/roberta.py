"""RoBERTa (Liu et al. 2019), XLM-RoBERTa (Conneau et al. 2019) and CamemBERT (Martin et al. 2019): one model.

Positions are counted from a padding row of their table on, over tokens that are not padding. Sequence classification
reads the first token without a pooler.
"""

from transformers.models.camembert import modeling_camembert
from transformers.models.roberta import modeling_roberta
from transformers.models.xlm_roberta import modeling_xlm_roberta

from bert_fast.families.layout import HEADS, bert_like
from bert_fast.modeling import derive

FAMILIES = [
    bert_like(
        hf,
        prefix,
        position_padding=True,
        sequence_readers={
            getattr(hf, f"{prefix}ForSequenceClassification"): getattr(hf, f"{prefix}ClassificationHead")
        },
        first_token_heads=(f"{prefix}ForSequenceClassification", f"{prefix}ForMultipleChoice"),
        other_heads=(f"{prefix}ForCausalLM", *(prefix + head for head in HEADS)),
    )
    for hf, prefix in (
        (modeling_roberta, "Roberta"),
        (modeling_xlm_roberta, "XLMRoberta"),
        (modeling_camembert, "Camembert"),
    )
]
for _family in FAMILIES:
    globals().update(derive(_family, __name__))
