"""Backward as transformers has it: of what was written into since the forward, and of gradients in batches.

torch refuses a backward that reads a tensor which was written into. Which ones transformers' backward reads is part of
what a training loop may do between forward and backward: noise put on embeddings and taken off again, delayed steps of
an optimizer, buffers that are filled anew.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import assert_close_fp32, assert_gradients_close, assert_tier, model_inputs, pair, ragged_mask, random_ids
from kernel_cases import READ, cases
from kernel_helpers import body
from test_families import pair as family_pair
from torch import nn

from bert_fast import attention_interface, encoder, modules
from bert_fast.family import family_of
from bert_fast.kernels.embed_layer_norm import embed_layer_norm, embed_layer_norm_triton
from bert_fast.packing import make_packing

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EVERYTHING = {"output_hidden_states": True, "output_attentions": True}
FAMILY_INPUTS = {"input_ids": random_ids().clamp(2), "attention_mask": ragged_mask()}  # no padding token in between
ATTN, WAYS = pytest.mark.parametrize("attn", ["eager", "sdpa"]), pytest.mark.parametrize("way", ["encoder", "module"])
Models = tuple[Any, Any]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads take longer to start than these models to run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def through(way: str, models: Models) -> Models:
    """module: a hook on the first layer, so that transformers' forward drives our modules."""
    if way == "module":
        for model in models:
            layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
            layers[0].register_forward_hook(lambda *_: None)
    return models


def loss_of(output: Any) -> torch.Tensor:
    names = ("last_hidden_state", "pooler_output", "logits")
    return sum(output[name].square().sum() for name in names if name in output)


def fate(loss: torch.Tensor) -> str:
    """Of a backward: what torch says of a tensor that was written into, or that nothing was in the way."""
    try:
        loss.backward()
    except RuntimeError as error:
        assert re.search("modified (by an )?inplace", str(error))
        return "refused"
    return "done"


def assert_same_fate(models: Models, run: Callable[[Any], torch.Tensor], what: str) -> str:
    """run(model): a loss, after something was written into. The fate of both backwards, and the same gradients."""
    fates = []
    for model in models:
        model.zero_grad()
        fates.append(fate(run(model)))
    assert fates[0] == fates[1], f"{what}: transformers' backward is {fates[0]}, ours {fates[1]}"
    if fates[0] == "done":
        assert_gradients_close(models[1], models[0], 1e-4)
    return fates[0]


def assert_same_fates(models: Models, inputs: dict[str, Any], names: list[str]) -> dict[str, str]:
    """Each of these parameters written into, one after the other."""
    fates = {}
    for name in names:

        def run(model: Any, name: str = name) -> torch.Tensor:
            loss = loss_of(model(**inputs))
            with torch.no_grad():
                model.get_parameter(name).add_(0.02)
            return loss

        fates[name] = assert_same_fate(models, run, name)
    return fates


@ATTN
@WAYS
def test_a_parameter_written_into(attn: str, way: str) -> None:
    models = through(way, pair(attn=attn, **NO_DROPOUT))
    inputs = model_inputs(kind="right")
    assert_tier(models[1], inputs, way, "hook")
    names = [name for name, _ in models[0].named_parameters() if ".0." not in name]
    refused = {name for name, said in assert_same_fates(models, inputs, names).items() if said == "refused"}
    assert {"embeddings.LayerNorm.bias", "encoder.layer.1.output.dense.weight", "pooler.dense.weight"} <= refused
    assert not any("embeddings.weight" in name or "dense.bias" in name or "self.query.bias" in name for name in refused)


TRAINED = {
    "biases": r"bias",
    "pooler": r"pooler",
    "layer": r"layer\.1",
    "query": r"1\.attention\.self\.query\.weight",
    "value bias": r"1\.attention\.self\.value\.bias",
    "attention dense": r"1\.attention\.output\.dense\.weight",
    "attention norm": r"1\.attention\.output\.LayerNorm\.bias",
    "up": r"1\.intermediate\.dense\.weight",
    "up bias": r"1\.intermediate\.dense\.bias",
    "down": r"1\.output\.dense\.weight",
    "down bias": r"1\.output\.dense\.bias",
    "norm": r"1\.output\.LayerNorm",
    "types": r"token_type_embeddings",
}


@pytest.mark.parametrize("trained,way", [*((t, "encoder") for t in TRAINED), ("biases", "module"), ("layer", "module")])
def test_a_parameter_written_into_where_others_are_frozen(trained: str, way: str) -> None:
    """What is frozen decides as well what backward reads. A classifier, which skips padding."""
    models = through(way, pair("BertForSequenceClassification", **NO_DROPOUT))
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(re.search(TRAINED[trained], name) is not None)
    names = [name for name, _ in models[0].named_parameters() if "layer.0" not in name]
    fates = assert_same_fates(models, model_inputs(kind="right"), names)
    assert "done" in fates.values()


@WAYS
@pytest.mark.parametrize("family", ["roberta", "electra", "distilbert", "mpnet"])
def test_a_parameter_of_another_family_written_into(family: str, way: str) -> None:
    models = through(way, family_pair(family))
    names = [name for name, _ in models[0].named_parameters() if ".0." not in name]
    fates = assert_same_fates(models, FAMILY_INPUTS, names[::2] if way == "encoder" else names[1::4])
    assert set(fates.values()) == {"done", "refused"}


@WAYS
@pytest.mark.parametrize("what", ["input_ids", "token_type_ids", "position_ids", "attention_mask", "inputs_embeds"])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_callers_buffers_are_filled_anew(what: str, frozen: bool, way: str) -> None:
    """Indices are read where the table's gradient is needed; frozen: it is not, that of what follows is."""
    models = through(way, pair(**NO_DROPOUT))
    for model in models if frozen else ():
        for table in (m for m in model.modules() if isinstance(m, nn.Embedding)):
            table.requires_grad_(False)

    def run(model: Any) -> torch.Tensor:
        given = model_inputs(kind="right") | {name: torch.arange(11).repeat(3, 1) % 3 for name in [what]}
        if what == "inputs_embeds":
            given |= {"input_ids": None, what: torch.randn(3, 11, 32, generator=torch.Generator().manual_seed(0))}
        if what == "attention_mask":
            given[what] = ragged_mask()
        loss = loss_of(model(**given))
        given[what].fill_(1)
        return loss

    said = assert_same_fate(models, run, what)
    assert (said == "refused") == (what.endswith("_ids") and not frozen)


@WAYS
@pytest.mark.parametrize("name", ["position_ids", "token_type_ids"])
@pytest.mark.parametrize("given", [False, True])
def test_a_models_buffer_is_sent_again_between_two_forwards(name: str, given: bool, way: str) -> None:
    """As DistributedDataParallel does before every forward. given: position_ids are the caller's."""
    extra = {"position_ids": torch.arange(11).flip(0)[None]} if given else {}

    def run(model: Any) -> torch.Tensor:
        loss = loss_of(model(**model_inputs(kind="right", **extra)))
        buffer = getattr(model.embeddings, name)
        buffer.copy_(buffer.clone())
        return loss + loss_of(model(**model_inputs(**extra)))

    said = assert_same_fate(through(way, pair(**NO_DROPOUT)), run, name)
    assert (said == "refused") == (name == "position_ids" and not given)


@ATTN
@WAYS
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("shape", [(3, 1, 11, 11), (1, 1, 1, 11)])
def test_a_4d_mask_is_overwritten(attn: str, way: str, dropout: float, learned: bool, shape: tuple[int, ...]) -> None:
    """transformers' backward reads it in sdpa's fused attention alone, which has no dropout and no gradient of it."""
    models = through(way, pair(attn=attn, hidden_dropout_prob=0.0, attention_probs_dropout_prob=dropout))
    found = []
    for model in models:
        model.train().zero_grad()
        torch.manual_seed(0)
        mask = torch.zeros(shape)
        mask[..., 8:] = -1e4
        loss = loss_of(model(random_ids(), mask.requires_grad_(learned).expand(3, 4, 11, 11)))
        with torch.no_grad():
            mask.fill_(-3.0)
        found.append(fate(loss))
    assert found == ["refused" if attn == "sdpa" and not dropout and not learned else "done"] * 2
    if found[1] == "done":
        calm = copy.deepcopy(models[1])
        calm.zero_grad()
        torch.manual_seed(0)
        again = torch.zeros(shape)
        again[..., 8:] = -1e4
        loss_of(calm(random_ids(), again)).backward()
        assert_gradients_close(models[1], calm)
        if not dropout:
            assert_gradients_close(*models[::-1], 1e-4)


@pytest.mark.parametrize("kind", [None, "right"])
@pytest.mark.parametrize("frozen", ["", "layer.1.attention.self", "encoder"])
@pytest.mark.parametrize("what", ["hidden_states 0", "hidden_states 1", "last_hidden_state", "pooler_output"])
def test_an_output_is_written_into(what: str, frozen: str, kind: str | None) -> None:
    """A hidden state is the input of the next layer's projections, which read it where their weights are trained."""
    models, (name, *index) = pair(attn="sdpa", **NO_DROPOUT), what.split()
    for model in models:
        for parameter, p in model.named_parameters():
            p.requires_grad_(not frozen or frozen not in parameter)

    def run(model: Any) -> torch.Tensor:
        output = model(**model_inputs(kind=kind), output_hidden_states=True)
        loss = output.pooler_output.square().sum()
        with torch.no_grad():
            (output[name][int(index[0])] if index else output[name]).mul_(1.5)
        return loss

    said = assert_same_fate(models, run, what)
    assert said == "refused" or frozen and "hidden_states" in what


@pytest.mark.parametrize("kind", [None, "right"])
def test_returned_attentions_are_written_into(kind: str | None) -> None:
    def run(model: Any) -> torch.Tensor:
        output = model(**model_inputs(kind=kind), output_attentions=True)
        loss = loss_of(output)
        with torch.no_grad():
            output.attentions[1].mul_(1.5)
        return loss

    assert assert_same_fate(pair(**NO_DROPOUT), run, "attentions") == "refused"


def batched(output: Any, inputs: list[torch.Tensor], names: tuple[str, ...], way: str) -> list[torch.Tensor]:
    """Gradients of inputs for 3 gradients of every named output at once, by one of torch's two vmaps, or one by one."""
    outputs = [t for name in names for t in (output[name] if type(output[name]) is tuple else [output[name]])]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(3, *t.shape, generator=generator).to(t.dtype) for t in outputs]

    def gradients(*weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(outputs, inputs, weights, retain_graph=True)

    if way == "is_grads_batched":
        return list(torch.autograd.grad(outputs, inputs, weights, retain_graph=True, is_grads_batched=True))
    if way == "vmap":
        return list(torch.vmap(gradients)(*weights))
    return list(map(torch.stack, zip(*(gradients(*(w[i] for w in weights)) for i in range(3)), strict=True)))


def read_parameters(model: Any) -> list[torch.Tensor]:
    """Those with a gradient: not a key's bias, whose gradient is noise."""
    names = ("word_embeddings", "LayerNorm", "layer_norm", ".1.", "pooler")
    return [
        p for n, p in model.named_parameters()
        if any(part in n for part in names) and not n.endswith(("key.bias", "k_lin.bias", "attn.k.bias"))
    ]  # fmt: skip


@WAYS
@pytest.mark.parametrize("by", ["is_grads_batched", "vmap"])
@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert", "mpnet"])
def test_gradients_in_batches(family: str, by: str, way: str, recwarn: pytest.WarningsRecorder) -> None:
    """Of all outputs, hidden states and attentions among them; without a warning about a slow path of torch's."""
    models, found = through(way, family_pair(family)), []
    names = ("last_hidden_state", "hidden_states", "attentions")
    for model in models:
        output = model(**FAMILY_INPUTS, **EVERYTHING)
        read = (*names, "pooler_output") if "pooler_output" in output else names
        found.append(batched(output, read_parameters(model), read, by))
    assert_close_fp32(found[1], found[0], factor=1e-4)
    assert not [w for w in recwarn if "batching rule" in str(w.message)]


@pytest.mark.parametrize("padding", ["exact", "skip"])
@pytest.mark.parametrize("way", ["is_grads_batched", "vmap"])
def test_batches_with_dropout(padding: str, way: str) -> None:
    """Every gradient of a batch sees the same dropout, that of the forward."""
    _, ours = pair(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
    output = ours.set_padding(padding).train()(**model_inputs(kind="right"))
    args = output, read_parameters(ours), ("last_hidden_state", "pooler_output")
    if padding == "skip":
        args = output, read_parameters(ours), ("pooler_output",)
    assert_close_fp32(batched(*args, way), batched(*args, "one by one"), factor=2e-5)


@pytest.mark.parametrize("way", ["is_grads_batched", "vmap"])
def test_batches_under_autocast(way: str) -> None:
    _, ours = pair(**NO_DROPOUT)
    with torch.autocast("cpu", torch.bfloat16):
        output = ours(**model_inputs(kind="right"))
        args = output, read_parameters(ours), ("last_hidden_state", "pooler_output")
        assert_close_fp32(batched(*args, way), batched(*args, "one by one"), factor=0.05)


@ATTN
@pytest.mark.parametrize("flags", [{}, EVERYTHING], ids=["plain", "outputs"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_jacobian(attn: str, flags: dict[str, bool], create_graph: bool) -> None:
    upstream, ours = pair(attn=attn)
    embeds = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for model, vectorize in ((upstream, False), (ours, False), (ours, True)):
        given = embeds.clone().requires_grad_()
        jacobian = torch.autograd.functional.jacobian(
            lambda e, model=model: model(inputs_embeds=e, **(flags if attn == "eager" else {})).pooler_output[:, :3],
            given, create_graph=create_graph and attn == "eager", vectorize=vectorize,
        )  # fmt: skip
        found.append([jacobian])
        if jacobian.requires_grad:
            found[-1] += torch.autograd.grad(jacobian.square().sum(), [given, *read_parameters(model)[1:]])
    for ours in found[1:]:
        assert_close_fp32(ours, found[0], factor=1e-4)


@WAYS
@pytest.mark.parametrize("trained", ["layer.1", "1.intermediate", "1.output.dense"])
@pytest.mark.parametrize("embeds", [False, True])
def test_a_second_derivative_of_frozen_parts(trained: str, embeds: bool, way: str) -> None:
    """What backward did not read was not kept for it, and is not missed; nor where gradients come in batches.

    What lies before all that is trained may be written into.
    """
    found = []
    for model in through(way, pair(**NO_DROPOUT)):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name)
        given = torch.randn(3, 11, 32, generator=torch.Generator().manual_seed(1)).requires_grad_(embeds)
        wanted = [p for p in read_parameters(model) if p.requires_grad] + [given] * embeds
        output = model(inputs_embeds=given)
        if trained != "layer.1" and not embeds:
            with torch.no_grad():
                model.encoder.layer[1].attention.output.dense.bias.add_(1)
        first = torch.autograd.grad(output.pooler_output.sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted, retain_graph=True)
        found.append([*first, *second, *batched(output, wanted, ("pooler_output",), "is_grads_batched")])
    assert_close_fp32(found[1], found[0], factor=1e-4)


def test_a_second_derivative_after_a_bias_changed_is_refused() -> None:
    """A forward is computed again for it, and with another bias it would be another one's."""
    _, ours = pair(**NO_DROPOUT)
    for name in ("attention.self.query.bias", "output.dense.bias"):
        loss, bias = loss_of(ours(**model_inputs())), ours.encoder.layer[0].get_parameter(name)
        with torch.no_grad():
            bias.add_(1)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*\(32,\) is at version"):
            torch.autograd.grad(loss, [ours.encoder.layer[1].output.dense.weight, bias], create_graph=True)


KEEPING = ("linear", "linear_gelu_pre", "qkv_linear", "pool", "embed_layer_norm")


@pytest.mark.parametrize("op,case", [(op, case) for op in KEEPING for case in cases(op) if case != "no gradient"])
def test_an_op_keeps_what_torchs_own_would(op: str, case: str) -> None:
    """For each trained input, each other one is written into: refused where the reference's backward is."""
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in cases(op)[case]]
    floats = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()]
    one = {id(args[i]): i for i in floats}.values()  # a parameter given three times is one
    for trained in one:
        for touched in one:
            found = []
            for name in ("ref", ""):
                given = {id(args[i]): args[i].clone() for i in one}
                leaf = given[id(args[trained])].requires_grad_()
                out = body(op, name)(*(given.get(id(a), a) for a in args))
                out = [t for t in (out if isinstance(out, tuple) else (out,))[: READ.get(op)] if t.requires_grad]
                with torch.no_grad():
                    given[id(args[touched])].add_(1)
                found.append((fate(sum(t.square().sum() for t in out)) if out else "nothing to do", leaf.grad))
            (wanted, expected), (said, got) = found
            if wanted == "nothing to do":  # a table, where embeddings are given
                continue
            assert said == wanted, f"{op} {case}: of {trained}, after {touched} was written into"
            if said == "done":
                torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_not_read_is_not_kept(frozen: bool) -> None:
    """The input of a product below which nothing is trained, its weight above which nothing is, and biases."""
    seen: list[torch.Tensor] = []
    x, weight, bias, _ = (t if t is None else t.detach().clone() for t in cases("linear")["all"])
    (x if frozen else weight).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        body("linear", "")(x, weight, bias.requires_grad_(), None)
    assert [t.data_ptr() for t in seen] == [(weight if frozen else x).data_ptr()]


@WAYS
def test_the_sum_of_the_embeddings_is_made_for_a_backward_alone(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = through(way, pair())
    inputs, wanted = model_inputs(kind="right"), []

    def embed(*args: Any) -> tuple[torch.Tensor, ...]:
        outputs = embed_layer_norm(*args)
        wanted.append(outputs[2].numel() > 0)
        return outputs

    for module in (encoder, modules):
        monkeypatch.setattr(module, "embed_layer_norm", embed)
    with torch.no_grad():
        ours(**inputs), ours.train()(**inputs)
    ours(**inputs)
    assert wanted == [False, False, True]


def test_a_table_that_is_not_read_is_no_part_of_the_graph() -> None:
    """DistributedDataParallel waits for the gradient of whatever is."""
    for model in pair():
        model.requires_grad_(False).embeddings.word_embeddings.requires_grad_()
        assert not model(inputs_embeds=torch.randn(2, 5, 32)).last_hidden_state.requires_grad
        assert model(random_ids()).last_hidden_state.requires_grad


@pytest.mark.interpreter
def test_positions_that_the_buffer_of_token_types_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No position's token type is another one's: an error on the CPU, a row of NaN where nobody has looked."""
    _, ours = pair()
    ours.embeddings.position_embeddings = nn.Embedding(48, 32)
    view, ids = family_of(ours).view(ours).embeddings, random_ids(2, 4)
    packing = make_packing(None, 2, 4, torch.device("cpu"), False, True)
    positions = torch.tensor([[0, 23, 24, 5], [47, 1, 2, 3]])
    args = view, packing, ids, None, positions, None, True, False
    with pytest.raises(IndexError):
        encoder._embed(*args)
    monkeypatch.setattr(encoder, "embed_layer_norm", embed_layer_norm_triton)
    rows, _ = encoder._embed(*args)
    assert torch.equal(rows.isnan().all(1), positions.flatten() > 23)
    assert torch.equal(rows.isnan().any(1), positions.flatten() > 23)


def test_a_mask_of_the_attention_interface_written_into_afterwards() -> None:
    """Under attn_implementation="bert_fast" as under eager: the mask is the caller's again after the forward."""
    found = []
    for kind in ("eager", "bert_fast"):
        query, key, value = (torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
        query.requires_grad_()
        mask = torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(3))
        if kind == "eager":
            out = (torch.softmax(query @ key.mT * 8**-0.5 + mask, -1) @ value).transpose(1, 2)
        else:
            out = attention_interface.attention_forward(nn.Module().eval(), query, key, value, mask)[0]
        mask.fill_(1)
        out.square().sum().backward()
        found.append(query.grad)
    torch.testing.assert_close(found[1], found[0])


def test_embeddings_given_leave_the_word_table_out() -> None:
    """DDP looks for parameters that are in the graph: in the module tier too the table is not."""
    reached = []
    for model in through("module", pair(**NO_DROPOUT)):
        embeds = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
        loss = model.train()(inputs_embeds=embeds).last_hidden_state.square().sum()
        table = model.embeddings.word_embeddings.weight
        todo, seen, leaves = [loss.grad_fn], set(), set()
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaves.add(id(getattr(node, "variable", None)))
            todo += [after for after, _ in node.next_functions]
        reached.append(id(table) in leaves)
    assert reached == [False, False]
