"""CamemBERT (Martin et al. 2019): RoBERTa in a modeling file of its own."""

from transformers.models.camembert import modeling_camembert as hf

from bert_fast.families.layout import roberta_like
from bert_fast.modeling import derive

CAMEMBERT = roberta_like(hf, "Camembert")
globals().update(derive(CAMEMBERT, __name__))
