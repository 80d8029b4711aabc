"""bert-fast: Hugging Face BERT on fused kernels, the same outputs, one changed import.

>>> from bert_fast import BertModel  # instead of: from transformers import BertModel
"""

from transformers import BertConfig, BertPreTrainedModel

from bert_fast.accelerate import accelerate, restore
from bert_fast.explain import Explanation, explain
from bert_fast.modeling import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
)

__version__ = "0.1.0"

__all__ = [
    "BertConfig",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertLMHeadModel",
    "BertModel",
    "BertPreTrainedModel",
    "Explanation",
    "__version__",
    "accelerate",
    "explain",
    "restore",
]
