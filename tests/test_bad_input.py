"""Wrong calls: transformers' exception type where it raises too, and a message that names the argument."""

import re

import pytest
import torch
import transformers
from helpers import VOCAB, head_inputs, model_inputs, pair, tiny_config

import bert_fast

B, S, HIDDEN, TABLE = 3, 11, 32, 24
IDS = model_inputs()["input_ids"]
EMBEDS = torch.randn(B, S, HIDDEN)
MASK = torch.ones(B, S, dtype=torch.long)


def with_one(tensor, value):
    changed = tensor.clone()
    changed[1, 2] = value
    return changed


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.long)


# name: (arguments, exception types, what the message must name: the argument, the value or shape, the expectation)
CASES = {
    "both": (dict(input_ids=IDS, inputs_embeds=EMBEDS), ValueError, ["input_ids", "inputs_embeds"]),
    "neither": (dict(attention_mask=MASK), ValueError, ["input_ids", "inputs_embeds"]),
    "id too large": (dict(input_ids=with_one(IDS, VOCAB)), IndexError, ["input_ids", r"\b50\b"]),
    "id negative": (dict(input_ids=with_one(IDS, -7)), IndexError, ["input_ids", "-7", r"\b(49|50)\b"]),
    "id at padding": (
        dict(input_ids=with_one(IDS, 999), attention_mask=with_one(MASK, 0)),
        IndexError,
        ["input_ids", "999"],
    ),
    "token type": (
        dict(input_ids=IDS, token_type_ids=with_one(zeros(B, S), 3)),
        IndexError,
        ["token_type_ids", r"\b3\b"],
    ),
    "negative token type": (
        dict(inputs_embeds=EMBEDS, token_type_ids=with_one(zeros(B, S), -1)),
        IndexError,
        ["token_type_ids", "-1"],
    ),
    "position": (
        dict(input_ids=IDS, position_ids=with_one(zeros(B, S), TABLE)),
        (RuntimeError, IndexError),
        ["position_ids", r"\b24\b"],
    ),
    "position, types given": (
        dict(input_ids=IDS, position_ids=with_one(zeros(B, S), TABLE), token_type_ids=zeros(B, S)),
        IndexError,
        ["position_ids", r"\b24\b"],
    ),
    "negative position": (
        dict(input_ids=IDS, position_ids=with_one(zeros(B, S), -2)),
        (RuntimeError, IndexError),
        ["position_ids", "-2"],
    ),
    "S past the table": (dict(input_ids=zeros(2, 25)), RuntimeError, [r"\b25\b", r"\b24\b", "position"]),
    "embeds past the table": (
        dict(inputs_embeds=torch.randn(2, 25, HIDDEN)),
        RuntimeError,
        [r"\b25\b", r"\b24\b", "position"],
    ),
    "short mask": (
        dict(input_ids=IDS, attention_mask=MASK[:, :7].tril()),
        RuntimeError,
        ["attention_mask", r"\b7\b", r"\b11\b"],
    ),
    "long mask": (
        dict(input_ids=IDS, attention_mask=torch.ones(B, 13).tril()),
        RuntimeError,
        ["attention_mask", r"\b13\b", r"\b11\b"],
    ),
    "mask of a smaller batch": (
        dict(input_ids=IDS, attention_mask=torch.ones(2, S).tril()),
        IndexError,
        ["attention_mask", r"\b2\b", r"\b3\b"],
    ),
    "0-D mask": (dict(input_ids=IDS, attention_mask=torch.ones(())), IndexError, ["attention_mask", r"\b11\b"]),
    "1-D mask": (
        dict(input_ids=IDS, attention_mask=torch.arange(S)),
        IndexError,
        ["attention_mask", r"\b11\b"],
    ),
    "3-D mask": (
        dict(input_ids=IDS, attention_mask=torch.ones(B, S, S).tril()),
        RuntimeError,
        ["attention_mask", r"3, 11, 11|3-D|3D"],
    ),
    "3-D mask, one query": (
        dict(input_ids=IDS, attention_mask=torch.zeros(B, 1, S)),
        IndexError,
        ["attention_mask", r"3, 1, 11"],
    ),
    "5-D mask": (
        dict(input_ids=IDS, attention_mask=torch.zeros(B, 1, 1, S, S)),
        IndexError,
        ["attention_mask", r"3, 1, 1, 11, 11"],
    ),
    "4-D mask, keys": (
        dict(input_ids=IDS, attention_mask=torch.zeros(B, 1, S, 7)),
        RuntimeError,
        ["attention_mask", r"\b7\b", r"\b11\b"],
    ),
    "4-D mask, queries": (
        dict(input_ids=IDS, attention_mask=torch.zeros(B, 1, 5, S)),
        RuntimeError,
        ["attention_mask", r"\b5\b", r"\b11\b"],
    ),
    "4-D mask, heads": (
        dict(input_ids=IDS, attention_mask=torch.zeros(B, 3, S, S)),
        RuntimeError,
        ["attention_mask", r"\b3\b", r"\b4\b"],
    ),
    "4-D mask, batch": (
        dict(input_ids=IDS, attention_mask=torch.zeros(2, 1, S, S)),
        RuntimeError,
        ["attention_mask", r"\b2\b", r"\b3\b"],
    ),
    "no sequence": (dict(input_ids=IDS[:0]), RuntimeError, ["input_ids", r"\b0\b", r"\b11\b"]),
    "no token": (dict(input_ids=IDS[:, :0]), RuntimeError, ["input_ids", r"\b3\b", r"\b0\b"]),
    "no embeds": (dict(inputs_embeds=EMBEDS[:0]), RuntimeError, ["inputs_embeds", r"\b0\b", r"\b11\b"]),
    "1-D ids": (dict(input_ids=IDS[0]), ValueError, ["input_ids", r"\b11\b"]),
    "3-D ids": (dict(input_ids=IDS[None]), ValueError, ["input_ids", r"1, 3, 11"]),
    "float ids": (dict(input_ids=IDS.float()), RuntimeError, ["input_ids", "float32", "int"]),
    "bool ids": (dict(input_ids=IDS.bool()), RuntimeError, ["input_ids", "bool", "int"]),
    "int16 ids": (dict(input_ids=IDS.short()), RuntimeError, ["input_ids", "int16", "int"]),
    "ids elsewhere": (dict(input_ids=IDS.to("meta")), RuntimeError, ["input_ids", "meta", "cpu"]),
    "embeds too narrow": (
        dict(inputs_embeds=EMBEDS[..., :31]),
        RuntimeError,
        ["inputs_embeds", r"\b31\b", r"\b32\b"],
    ),
    "2-D embeds": (dict(inputs_embeds=EMBEDS[0]), ValueError, ["inputs_embeds", r"11, 32"]),
    "embeds of another dtype": (
        dict(inputs_embeds=EMBEDS.double()),
        RuntimeError,
        ["inputs_embeds", "float64", "float32"],
    ),
    "short token types": (
        dict(input_ids=IDS, token_type_ids=zeros(B, 7)),
        RuntimeError,
        ["token_type_ids", r"\b7\b", r"\b11\b"],
    ),
    "position_ids of another batch": (
        dict(input_ids=IDS, position_ids=zeros(2, S)),
        RuntimeError,
        ["position_ids", r"\b2\b", r"\b3\b"],
    ),
    "1-D position_ids": (dict(input_ids=IDS, position_ids=torch.arange(S)), RuntimeError, ["position_ids", r"\b11\b"]),
}
MORE_STRICT = {"ids elsewhere"}  # transformers lets them pass


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_one_clear_error(name, attn):
    upstream, ours = pair(attn=attn)
    arguments, types, words = CASES[name]
    with torch.no_grad(), pytest.raises(types) as caught:
        ours(**arguments)
    for word in words:
        assert re.search(word, str(caught.value)), f"{word!r} is not in: {caught.value}"
    if name not in MORE_STRICT:
        with torch.no_grad(), pytest.raises(types) as theirs:
            upstream(**arguments)
        assert isinstance(caught.value, theirs.type), f"{caught.type} where transformers raises {theirs.type}"
    ours(input_ids=IDS)  # and the model is as it was


@pytest.mark.parametrize("padding", ["exact", "skip"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("flags", [{}, {"output_attentions": True}])
def test_the_same_in_every_mode(padding, grad, flags):
    _, ours = pair()
    ours.set_padding(padding)
    for name in ("id too large", "token type", "short mask", "3-D mask", "S past the table", "no token", "both"):
        arguments, types, words = CASES[name]
        with torch.set_grad_enabled(grad), pytest.raises(types, match=words[0]):
            ours(**arguments, **flags)


@pytest.mark.parametrize("cls", ["BertForMaskedLM", "BertForSequenceClassification", "BertForMultipleChoice"])
def test_through_a_head(cls):
    _, ours = pair(cls)
    good = head_inputs(cls)
    ours(**good)
    for name, value, error in (
        ("input_ids", good["input_ids"] + VOCAB, IndexError),
        ("token_type_ids", good["token_type_ids"] + 3, IndexError),
        ("attention_mask", good["attention_mask"][..., :7], RuntimeError),
    ):
        with torch.no_grad(), pytest.raises(error, match=name):
            ours(**{**good, name: value})


def test_hidden_not_divisible_by_heads():
    for package in (transformers, bert_fast):
        with pytest.raises(ValueError, match=r"30.*4"):
            package.BertModel(tiny_config(hidden_size=30))


SHAPES = [(1,), (S,), (7,), (1, S), (B, 1), (B, 13), (B, 7), (2, S), (5, S), (1, 1), (0, S), (B, S, S), (B, 1, S)]


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", [*SHAPES, (B, S, 1), (1, 1, S), (B, 1, 1, S, S)], ids=str)
@pytest.mark.parametrize("padding", ["exact", "skip"])
def test_masks_of_other_shapes(shape, attn, padding):
    """transformers drops one of nothing but ones unread; of the rest it lets some pass and raises for the others."""
    upstream, ours = pair(attn=attn)
    ours.set_padding(padding)
    for values in ("ones", "first", "last"):
        mask = torch.ones(shape, dtype=torch.long)
        if mask.numel() and values != "ones":
            mask.view(-1)[0 if values == "first" else -1] = 0
        outcomes = []
        for model in (upstream, ours):
            try:
                with torch.no_grad():
                    outcomes.append(model(IDS, attention_mask=mask).last_hidden_state)
            except (IndexError, RuntimeError) as error:
                outcomes.append(error)
        theirs, mine = outcomes
        assert type(theirs) is type(mine), f"{values}: {theirs!r}, {mine!r}"
        if isinstance(theirs, torch.Tensor):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
