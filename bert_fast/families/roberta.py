"""RoBERTa (Liu et al. 2019)."""

from transformers.models.roberta import modeling_roberta as hf

from bert_fast.families.layout import roberta_like
from bert_fast.modeling import derive

ROBERTA = roberta_like(hf, "Roberta")
globals().update(derive(ROBERTA, __name__))
