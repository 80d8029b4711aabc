"""BERT (Devlin et al. 2018)."""

from transformers.models.bert import modeling_bert as hf

from bert_fast.families.layout import HEADS, bert_like
from bert_fast.modeling import derive
from bert_fast.modules import Transform

BERT = bert_like(
    hf,
    "Bert",
    fused={hf.BertPredictionHeadTransform: Transform},
    first_token_heads=("BertForNextSentencePrediction", "BertForSequenceClassification", "BertForMultipleChoice"),
    other_heads=("BertForPreTraining", "BertLMHeadModel", *(f"Bert{head}" for head in HEADS)),
)
globals().update(derive(BERT, __name__))
