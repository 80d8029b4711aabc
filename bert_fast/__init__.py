"""bert-fast: Hugging Face BERT on fused kernels, the same outputs, one changed import.

>>> from bert_fast import BertModel  # instead of: from transformers import BertModel

Models that somebody else built: `bert_fast.accelerate(model)`.
"""

from bert_fast import comparison, families  # noqa: F401  the one compares a release of transformers not known to us
from bert_fast.accelerate import accelerate, restore
from bert_fast.explain import Explanation, explain

with families.left_out_where_it_does_not_fit('attn_implementation="bert_fast"'):
    from bert_fast import attention_interface  # noqa: F401  registers it

__version__ = "0.1.0"

# transformers' configs and base classes, and our classes in place of its models
_DROP_INS = families.drop_ins(
    (
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
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        "DistilBertForMultipleChoice",
        "DistilBertForQuestionAnswering",
        "DistilBertForSequenceClassification",
        "DistilBertForTokenClassification",
        "DistilBertModel",
        "DistilBertPreTrainedModel",
        "RobertaConfig",
        "RobertaForCausalLM",
        "RobertaForMaskedLM",
        "RobertaForMultipleChoice",
        "RobertaForQuestionAnswering",
        "RobertaForSequenceClassification",
        "RobertaForTokenClassification",
        "RobertaModel",
        "RobertaPreTrainedModel",
        "XLMRobertaConfig",
        "XLMRobertaForCausalLM",
        "XLMRobertaForMaskedLM",
        "XLMRobertaForMultipleChoice",
        "XLMRobertaForQuestionAnswering",
        "XLMRobertaForSequenceClassification",
        "XLMRobertaForTokenClassification",
        "XLMRobertaModel",
        "XLMRobertaPreTrainedModel",
    )
)
globals().update(_DROP_INS)

__all__ = [*_DROP_INS, "Explanation", "__version__", "accelerate", "explain", "restore"]
