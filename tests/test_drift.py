"""A release of transformers that differs, in each way that one might: never a wrong number.

The numbers are compared in drift_probe.py, in processes that import an altered copy; here, what is said of them.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import pytest
from drift_helpers import ROOT, Change, altered_copy, chained, moved_class, moved_out, replaced, run_python

PROBE = str(ROOT / "tests/drift_probe.py")
LEFT_OUT = "left out"
ELSEWHERE = {"models/bert_generation/elsewhere.py": moved_class("bert_generation", "BertGenerationSelfOutput")}


class Drift(NamedTuple):
    """How a family's modeling file is altered; a pattern of the difference, None where there is none, or LEFT_OUT;
    options of the config that are set."""

    family: str
    change: Change
    expected: str | None
    options: dict[str, Any] = {}


NORM = r"self\.LayerNorm\(hidden_states \+ input_tensor\)"
MASKED = r"(inputs_embeds=embedding_output,\s+attention_mask=)attention_mask"
WITHOUT_MASKS = replaced((MASKED, r"\1None"))
CASES: dict[str, dict[str, Drift]] = {
    "maths": {
        "BertModel": Drift(
            "bert",
            replaced((NORM, "self.LayerNorm(hidden_states) + input_tensor")),
            "last_hidden_state is off by",
        ),
        "RobertaModel": Drift(  # an inner argument is renamed
            "roberta",
            chained(
                replaced(("attention_mask", "keep_mask"), within="RobertaSelfAttention"),
                replaced(
                    (
                        "attention_mask=attention_mask,",
                        '**{"attention_mask" if self.is_cross_attention else "keep_mask": attention_mask},',
                    ),
                    within="RobertaAttention",
                ),
            ),
            "attentions",
        ),
        "XLMRobertaModel": Drift(
            "xlm_roberta",
            replaced((r"hidden_states\[:, 0\]", "hidden_states[:, -1]"), within="XLMRobertaPooler"),
            "pooler_output is off by",
        ),
        "CamembertModel": Drift("camembert", replaced(("CamembertSelfOutput", "CamembertProjection")), LEFT_OUT),
        "DistilBertModel": Drift(
            "distilbert",
            replaced((r"self\.activation\(x\)", 'nn.functional.gelu(x, approximate="tanh")'), within="FFN"),
            "last_hidden_state is off by",
        ),
        "ElectraModel": Drift(
            "electra",
            replaced((r"inputs_embeds \+ token_type", "1.01 * inputs_embeds + token_type"), within="ElectraEmbeddings"),
            "last_hidden_state is off by",
        ),
        "MPNetModel": Drift(
            "mpnet",
            replaced((r"/ math\.sqrt\(self\.attention_head_size\)", "/ self.attention_head_size")),
            "last_hidden_state is off by",
        ),
        "BertGenerationEncoder": Drift("bert_generation", moved_out("BertGenerationSelfOutput", "elsewhere"), None),
    },
    "arguments": {
        "BertModel": Drift(
            "bert",
            replaced(
                ("token_type_ids: torch", "segment_ids: torch"),
                ("token_type_ids=token_type_ids", "token_type_ids=segment_ids"),
                within="BertModel",
            ),
            "has no argument 'token_type_ids'",
        ),
        "RobertaModel": Drift(  # one is added
            "roberta",
            replaced(
                (r"use_cache: bool \| None = None,", "use_cache: bool | None = None, temperature: float = 1.0,"),
                (r"encoder_outputs\.last_hidden_state", "encoder_outputs.last_hidden_state * temperature"),
                within="RobertaModel",
            ),
            None,
        ),
        "XLMRobertaModel": Drift(  # one is added within, and given
            "xlm_roberta",
            chained(
                replaced(
                    (r"input_tensor: torch\.Tensor\)", "input_tensor: torch.Tensor, factor: float = 1.0)"),
                    (r"hidden_states \+ input_tensor", "hidden_states * factor + input_tensor"),
                    within="XLMRobertaSelfOutput",
                ),
                replaced((r"attention_output, hidden_states\)", "attention_output, hidden_states, factor=1.5)")),
            ),
            "last_hidden_state is off by",
        ),
        "CamembertModel": Drift(
            "camembert",
            replaced(("_length: int = 0", "_length: int = 1"), within="CamembertEmbeddings"),
            "CamembertEmbeddings has another default of",
        ),
        "DistilBertModel": Drift("distilbert", replaced((r"\bFFN\b", "FeedForward")), LEFT_OUT),
        "ElectraModel": Drift(  # an option that a default config does not set
            "electra",
            replaced(
                (
                    r"super\(\).__init__\(\)",
                    'super().__init__()\n        self.s = getattr(config, "embedding_scale", 1.0)',
                ),
                (r"inputs_embeds \+ token_type", "self.s * inputs_embeds + token_type"),
                within="ElectraEmbeddings",
            ),
            r"ElectraEmbeddings reads config\.embedding_scale",
            {"embedding_scale": 2.0},
        ),
        "MPNetModel": Drift(
            "mpnet",
            replaced(
                (r"output_hidden_states: bool \| None = None", "output_hidden_states: bool | None = True"),
                within="MPNetModel",
            ),
            "MPNetModel has another default of 'output_hidden_states'",
        ),
        "BertGenerationEncoder": Drift("bert_generation", WITHOUT_MASKS, "hidden_states|last_hidden_state is off by"),
    },
    "training": {
        "BertModel": Drift(  # a dropout that is no module
            "bert",
            replaced(
                (r"super\(\).__init__\(\)", "super().__init__()\n        self.rate = config.hidden_dropout_prob"),
                (r"return hidden_states", "return nn.functional.dropout(hidden_states, self.rate, self.training)"),
                within="BertIntermediate",
            ),
            "in training: last_hidden_state is off by",
        ),
        "RobertaModel": Drift(
            "roberta",
            replaced(
                (
                    r"super\(\).__init__\(\)",
                    "super().__init__()\n        self.more = nn.Dropout(config.hidden_dropout_prob)",
                ),
                (r"return hidden_states", "return self.more(hidden_states)"),
                within="RobertaIntermediate",
            ),
            "has another dropout: encoder.layer.0.intermediate.more",
        ),
        "XLMRobertaModel": Drift(
            "xlm_roberta",
            replaced((r"hidden_states = self\.dropout\(hidden_states\)\n", "\n"), within="XLMRobertaSelfOutput"),
            "drops out hidden states elsewhere",
        ),
        "CamembertModel": Drift(
            "camembert",
            replaced((r"features\[:, 0, :\]", "features.mean(1)")),
            r"CamembertForSequenceClassification\(.*logits is off by",
        ),
        "DistilBertModel": Drift(
            "distilbert",
            replaced((r"0\.0 if not self\.training else self\.dropout\.p", "0.0")),
            "drops out attention weights elsewhere",
        ),
        "ElectraModel": Drift(
            "electra",
            replaced((NORM, "self.LayerNorm(hidden_states + input_tensor.detach())"), within="ElectraSelfOutput"),
            "the gradient of .* is off by",
        ),
        "MPNetModel": Drift("mpnet", WITHOUT_MASKS, "hidden_states|last_hidden_state is off by"),
    },
}


def complaint(model: str, drift: Drift, answer: dict[str, Any], stderr: str) -> str | None:
    """What is wrong with the probe's answer for one model."""
    found, expected = answer[model], drift.expected
    told = [text for text in answer["warnings"] if found["difference"] and found["difference"] in text]
    if found["wrong"] is not None:
        return f"a wrong number: {found['wrong']}"
    if expected is None:
        good = found["difference"] is None and found["fused"] and not found["left_out"]
    elif expected == LEFT_OUT:
        warned = re.findall(f"{model.removesuffix('Model')} does not fit it", stderr, re.IGNORECASE)
        good = found["left_out"] and not found["drop_in"] and len(warned) == 1
    else:
        good = re.search(expected, found["difference"] or "") and not found["fused"] and len(told) == 1
    return None if good else f"{found}, {len(told)} warnings"


@pytest.mark.parametrize("name", CASES)
def test_drift(name, tmp_path):
    """One process for every set of cases, since most of its time is imports."""
    cases = CASES[name]
    copy = altered_copy(tmp_path / "copy", {drift.family: drift.change for drift in cases.values()}, ELSEWHERE)
    options = {model: drift.options for model, drift in cases.items()}
    answer, stderr = run_python(copy, tmp_path / "cache", PROBE, json.dumps(options))
    complaints = {model: complaint(model, drift, answer, stderr) for model, drift in cases.items()}
    assert not {model: text for model, text in complaints.items() if text is not None}
