"""XLM-RoBERTa (Conneau et al. 2019): RoBERTa in a modeling file of its own."""

from transformers.models.xlm_roberta import modeling_xlm_roberta as hf

from bert_fast.families.layout import roberta_like
from bert_fast.modeling import derive

XLM_ROBERTA = roberta_like(hf, "XLMRoberta")
globals().update(derive(XLM_ROBERTA, __name__))
