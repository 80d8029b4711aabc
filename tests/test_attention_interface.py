"""attn_implementation="bert_fast" in models that nobody adapted: everything equals attn_implementation="eager"."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from interface_models import (
    DECODERS,
    GROUPED,
    MODELS,
    NO_DROPOUT,
    OWN_ATTENTION,
    SIZES,
    B,
    S,
    assert_same,
    inputs_of,
    model_of,
    run,
    tensors,
)
from kernel_helpers import assert_error_rule

import bert_fast
import bert_fast.attention_interface as interface
from bert_fast.attention_interface import NAME, attention_forward
from bert_fast.kernels.attention_heads import attention_heads_triton


@pytest.fixture
def calls(monkeypatch):
    """Arguments of each call of our op; `calls.upstream` counts those that transformers' functions got instead."""
    seen = SimpleNamespace(ops=[], upstream=0)
    op, upstream = interface.attention_heads, interface._upstream

    def counted(*args):
        seen.ops.append(SimpleNamespace(mask=args[3], causal=args[4], scale=args[5], probs=args[6], p=args[9]))
        return op(*args)

    def instead(*args):
        seen.upstream += 1
        return upstream(*args)

    monkeypatch.setattr(interface, "attention_heads", counted)
    monkeypatch.setattr(interface, "_upstream", instead)
    return seen


@pytest.mark.parametrize("wanted", [False, True], ids=["", "attentions"])
@pytest.mark.parametrize(
    "name,padding", [(n, p) for n in MODELS for p in (None, "right", "left", "empty") if p is None or n != "ViT"]
)
def test_equals_eager(name, padding, wanted, calls):
    """Outputs, hidden states, attentions, gradients; weights are computed where they are asked for, and only there."""
    inputs, flags = inputs_of(name, padding), dict(output_attentions=wanted, output_hidden_states=True)
    eager = run(model_of(name, "eager", training=True), inputs, **flags)
    assert not calls.ops
    ours = run(model_of(name, training=True), inputs, **flags)
    assert_same(ours, eager)
    assert (
        bool(calls.ops) != (name in OWN_ATTENTION)
        and not calls.upstream
        and all(call.probs == wanted for call in calls.ops)
    )
    assert any("attentions" in key for key in ours) == wanted and not any(x.isnan().any() for x in ours.values())


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT2", *DECODERS])
def test_generate(name, wanted):
    """Left padding, a growing cache, cross-attention: tokens, scores and the attentions of every step."""
    inputs = inputs_of(name, "left")
    inputs.pop("decoder_input_ids", None)
    flags = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    eager, ours = (
        model_of(name, impl).generate(**inputs, **flags, output_attentions=wanted) for impl in ("eager", NAME)
    )
    assert torch.equal(ours.sequences, eager.sequences) and len(eager.logits) == 6
    torch.testing.assert_close(ours.logits, eager.logits, rtol=1e-4, atol=1e-4)
    kind = "decoder_attentions" if name in DECODERS else "attentions"
    assert (getattr(ours, kind) is not None) == wanted
    if wanted:
        torch.testing.assert_close(getattr(ours, kind), getattr(eager, kind), rtol=1e-4, atol=1e-5)


def test_generate_with_a_static_cache_and_beams():
    inputs = inputs_of("Llama", "left")
    for flags in (dict(cache_implementation="static"), dict(num_beams=3)):
        flags |= dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
        eager, ours = (model_of("Llama", impl).generate(**inputs, **flags) for impl in ("eager", NAME))
        assert torch.equal(ours, eager)


def test_chunks_of_a_prompt():
    """Several queries behind a cache: the last rows of the triangle, not the first."""
    ids = inputs_of("Llama")["input_ids"]
    model = model_of("Llama")
    with torch.no_grad():
        first = model(ids[:, :8], use_cache=True)
        second = model(ids[:, 8:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(second, model_of("Llama", "eager")(ids).logits[:, 8:], rtol=1e-4, atol=1e-4)


def test_set_at_run_time(calls):
    inputs, config = inputs_of("Bert", "right"), hf.BertConfig(**SIZES)
    model = hf.BertModel(config).eval()
    plain = model(**inputs, output_attentions=True)
    assert not calls.ops and not plain.attentions, "sdpa has none"
    model.set_attn_implementation(NAME)
    ours = model(**inputs, output_attentions=True)
    assert len(calls.ops) == 2 and len(ours.attentions) == 2
    torch.testing.assert_close(ours.last_hidden_state, plain.last_hidden_state, rtol=1e-4, atol=1e-5)
    model.set_attn_implementation("eager")
    model(**inputs)
    assert len(calls.ops) == 2


@pytest.mark.parametrize("tier", ["encoder", "module"])
def test_our_own_models(calls, tier):
    """They have the same arithmetic in their packed path, and in their modules."""
    inputs, found = inputs_of("Bert", "empty"), []
    for impl in ("eager", NAME):
        torch.manual_seed(0)
        model = bert_fast.BertModel(hf.BertConfig(**SIZES, **NO_DROPOUT, attn_implementation=impl)).eval()
        if tier == "module":
            model.encoder.layer[0].register_forward_hook(lambda *_: None)
        assert bert_fast.explain(model, **inputs).tier == tier
        found.append(run(model, inputs, output_attentions=True))
    assert_same(found[1], found[0])
    assert not calls.ops and not calls.upstream


def test_what_the_op_is_given(calls):
    """Causal and nothing else is a flag, padding a bool mask of one head, nothing at all no mask."""
    with torch.no_grad():
        model_of("Llama")(**inputs_of("Llama"))
        model_of("Llama")(**inputs_of("Llama", "left"))
        model_of("Bert")(**inputs_of("Bert"))
        model_of("ModernBert")(**inputs_of("ModernBert"))
        model_of("Bert")(**inputs_of("Bert", "right"))
    plain, padded, full, windowed, right = (calls.ops[2 * i : 2 * i + 2] for i in range(5))
    assert all(c.causal and c.mask is None for c in plain)
    assert all(not c.causal and c.mask.dtype == torch.bool and c.mask.shape == (B, 1, S, S) for c in padded)
    assert all(not c.causal and c.mask is None for c in full)
    assert [c.mask is None for c in windowed] == [True, False], "one layer sees all, the other a window"
    assert windowed[1].mask[0, 0].sum(-1).tolist()[6] < S
    assert all(c.mask.dtype == torch.bool for c in right)


def test_the_mark_of_a_causal_mask():
    sizes = dict(batch_size=1, q_length=5, kv_length=5, config=hf.LlamaConfig())
    mask = interface.attention_mask(**sizes)
    assert torch.equal(mask, torch.ones(1, 1, 5, 5).tril().bool()) and interface._is_plain_causal(mask)
    assert not interface._is_plain_causal(mask[:, :, -2:]) and not interface._is_plain_causal(mask.clone())
    mask[:, :, :, 0] = False
    assert not interface._is_plain_causal(mask), "it has been written into"
    padded = torch.tensor([[False] + [True] * 4])
    assert not interface._is_plain_causal(interface.attention_mask(**sizes, attention_mask=padded))
    everything = interface.attention_mask(
        **sizes, allow_is_causal_skip=False, mask_function=hf.masking_utils.bidirectional_mask_function
    )
    assert everything.all() and not interface._is_plain_causal(everything)
    config = hf.LlamaConfig()
    assert interface.attention_mask(2, 1, 5, q_offset=4, config=config) is None, "one query sees all keys"
    assert interface.attention_mask(2, 3, 5, q_offset=2, config=config)[0, 0].sum(-1).tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    "model,knows",
    [
        (hf.LlamaModel, True),
        (hf.FalconModel, False),  # has an sdpa of its own, and adds the mask otherwise
        (hf.GitModel, False),  # calls attention functions in its vision part alone
        (hf.MPNetModel, False),
    ],
)
def test_who_gets_bools(model, knows):
    sizes = dict(batch_size=1, q_length=3, kv_length=3, dtype=torch.float64)
    for config in (model.config_class(), type("Sub", (model.config_class,), {})()):
        mask = interface.attention_mask(**sizes, config=config)
        knows &= type(config) is model.config_class  # nobody knows whose configuration a subclass is
        assert mask.dtype == (torch.bool if knows else torch.float64)


def test_a_model_may_slice_its_mask(calls):
    """As Gemma 4 does for layers that need the last queries alone."""
    module, (q, k, v) = module_of(), qkv()
    mask = interface.attention_mask(batch_size=2, q_length=9, kv_length=9, config=hf.LlamaConfig())
    whole, _ = attention_forward(module, q, k, v, mask)
    last, _ = attention_forward(module, q[:, :, -2:], k, v, mask[:, :, -2:])
    torch.testing.assert_close(last, whole[:, -2:])
    assert [c.causal for c in calls.ops] == [True, False]


def module_of(**attributes):
    module = torch.nn.Module()
    module.__dict__.update(attributes)
    return module.eval()


def qkv(H=4, Hkv=2, Sq=9, Skv=9, D=8, dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    return [
        torch.randn(2, n, h, D, generator=g).to(dtype).transpose(1, 2) for n, h in ((Sq, H), (Skv, Hkv), (Skv, Hkv))
    ]


def test_without_a_mask_is_causal_as_for_sdpa(calls):
    q, k, v = qkv()
    said = [
        (module_of(), {}, False),
        (module_of(is_causal=True), {}, True),
        (module_of(is_causal=True), {"is_causal": False}, False),
        (module_of(is_causal=False), {"is_causal": True}, True),
    ]
    for module, kwargs, _ in said:
        attention_forward(module, q, k, v, None, **kwargs)
    assert [c.causal for c in calls.ops] == [causal for _, _, causal in said]
    attention_forward(module_of(is_causal=True), q[:, :, -1:], k, v, None)
    assert not calls.ops[-1].causal, "one query sees all keys"


def test_bidirectional_use_of_a_decoder():
    inputs = inputs_of("Llama")
    with torch.no_grad():
        eager, ours, causal = (
            model_of("Llama", impl)(**inputs, **more).logits
            for impl, more in (("eager", {"is_causal": False}), (NAME, {"is_causal": False}), (NAME, {}))
        )
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    assert (ours - causal).abs().max() > 0.1


def test_what_it_cannot_do(calls):
    sizes = GROUPED | dict(head_dim=8)
    gemma = hf.Gemma2ForCausalLM(hf.Gemma2Config(**sizes, attn_implementation=NAME))
    with pytest.raises(NotImplementedError, match="'bert_fast': softcap is 50.0, expected None"):
        gemma(**inputs_of("Llama"))
    sinks = hf.GptOssForCausalLM(hf.GptOssConfig(**sizes, num_local_experts=2, attn_implementation=NAME))
    with pytest.raises(NotImplementedError, match=r"s_aux is a torch.float32 tensor \(4,\), expected None"):
        sinks(**inputs_of("Llama"))
    q, k, v = qkv()
    for name in ("sinks", "indices", "block_indices", "cache", "alibi_slopes", "attention_bias", "attn_logit_softcap"):
        with pytest.raises(NotImplementedError, match=f"{name} is 3, expected None.*attn_implementation='eager'"):
            attention_forward(module_of(), q, k, v, None, **{name: 3})
        attention_forward(module_of(), q, k, v, None, **{name: None})
    assert len(calls.ops) == 7 and not calls.upstream
    attention_forward(module_of(), q, k, v, None, sliding_window=4, position_ids=torch.arange(9), use_cache=True)


@pytest.mark.parametrize("name", ["Llama", "Bert"])
def test_masks_of_four_dimensions(name):
    """As users pass them: numbers to add, per head, in any float dtype; bools keep."""
    inputs, lower = inputs_of(name), torch.ones(S, S).tril().bool()
    added = torch.randn(B, 4, S, S, generator=torch.Generator().manual_seed(3))
    added = torch.where(lower, added, torch.finfo(torch.float32).min)
    for ours, eager in ((added, added), (lower[None, None], torch.where(lower, 0.0, added.min())[None, None])):
        found = (
            run(model_of(name, impl), inputs, attention_mask=mask, output_attentions=True)
            for impl, mask in ((NAME, ours), ("eager", eager))
        )
        assert_same(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Llama", "ModernBert", "ViT"])
def test_half_precision(name, dtype):
    """The one rule, to fp32: in float64 eager makes NaN of a window that holds padding alone."""
    inputs = inputs_of(name, None if name == "ViT" else "right")
    half = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
    for wanted in (False, True):
        ours, low = (
            run(model_of(name, i, dtype=dtype), half, False, output_attentions=wanted) for i in (NAME, "eager")
        )
        truth = run(model_of(name, "eager"), inputs, False, output_attentions=wanted)
        assert list(ours) == list(low)
        for what, x in ours.items():
            assert_error_rule(x, low[what], truth[what].double(), what)


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Bert", "T5"])
def test_autocast(name, wanted, calls):
    inputs = inputs_of(name, "empty")
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = (run(model_of(name, i), inputs, False, output_attentions=wanted) for i in (NAME, "eager"))
        context, _ = attention_forward(module_of(num_key_value_groups=2), *qkv(), None)
    assert context.dtype == torch.bfloat16, "of fp32 tensors too"
    truth = run(model_of(name, "eager"), inputs, False, output_attentions=wanted)
    calls.ops.pop()
    assert bool(calls.upstream) == wanted and bool(calls.ops) != wanted
    for what, x in ours.items():
        assert x.dtype == eager[what].dtype, what
        error, low = ((t.float() - truth[what]).norm().item() for t in (x, eager[what]))
        assert error <= 1.25 * low + 2**-6 * truth[what].norm().item(), what


def test_somebody_may_look_at_the_weights(calls):
    """A hook on an attention module sees them, as under eager; transformers' own hooks, which stay, ask for nothing."""
    model, inputs, seen = model_of("Bert"), inputs_of("Bert", "right"), []
    model(**inputs, output_attentions=True)
    calls.ops.clear()
    handle = model.encoder.layer[1].attention.self.register_forward_hook(lambda m, args, out: seen.append(out[1]))
    try:
        model(**inputs)
    finally:
        handle.remove()
    assert [c.probs for c in calls.ops] == [False, True]
    torch.testing.assert_close(seen[0], model_of("Bert", "eager")(**inputs, output_attentions=True).attentions[1])


def test_gradients_of_returned_weights():
    """The loss goes through them, so that they have its gradient."""
    found = []
    for impl in ("eager", NAME):
        model, inputs = model_of("Llama", impl), inputs_of("Llama", "left")
        out = model(**inputs, output_attentions=True)
        out.attentions[0].retain_grad()
        out.logits.square().sum().backward()
        found.append(out.attentions[0].grad)
    assert found[0].count_nonzero()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4 * found[0].abs().max().item())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_compiled(wanted, autocast):
    """transformers' functions, with a mask that leaves a sequence without a key."""
    inputs = inputs_of("Bert", "empty")
    model = model_of("Bert")
    targets = []

    def backend(graph, example_inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = tensors(compiled(**inputs, output_attentions=wanted))
        eager = tensors(model_of("Bert", "eager")(**inputs, output_attentions=wanted))
    assert_same(ours, eager, 0.04 if autocast else 1e-4)
    assert targets and not any("bert_fast" in target for target in targets)


def test_what_is_not_for_the_op(calls):
    """float64, large heads, values of another width, vmap, a scale of 0, queries of one sequence for all: as eager."""
    q, k, v = qkv()
    keep = torch.ones(1, 1, 9, 9).tril(-1).bool()  # the first query has no key
    cases = [
        (qkv(dtype=torch.float64), {}),
        (qkv(D=160), {}),
        ((q, k, v[..., :5]), {}),
        ((q, k, v), {"scaling": 0.0}),
        ((q[:1], k, v), {}),
    ]
    for module in (module_of(num_key_value_groups=2), module_of(num_key_value_groups=2, _forward_hooks={0: print})):
        for given, kwargs in cases:
            found, weights = attention_forward(module, *given, keep, **kwargs)
            scale = kwargs.get("scaling", given[0].shape[3] ** -0.5)
            dtype = given[0].dtype
            added = torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, torch.finfo(torch.float32).min)
            expected = interface._eager(module, *given, added, scale, 0.0)
            torch.testing.assert_close(found, expected[0])
            assert (weights is None) == (not module._forward_hooks)
            assert weights is None or torch.equal(weights, expected[1])
    assert not calls.ops and calls.upstream == 2 * len(cases)
    module = module_of(num_key_value_groups=2)
    mapped = torch.vmap(lambda x: attention_forward(module, x, k, v, keep)[0])(torch.stack([q, 2 * q]))
    assert calls.upstream == 2 * len(cases) + 1
    torch.testing.assert_close(mapped[1], attention_forward(module, 2 * q, k, v, keep)[0])
    turned = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))  # the last stride is not 1
    torch.testing.assert_close(attention_forward(module, *turned, keep)[0], attention_forward(module, q, k, v, keep)[0])
    with pytest.raises(RuntimeError, match="size"):  # a marked mask that does not fit is no mask of these keys
        marked = interface.attention_mask(batch_size=2, q_length=9, kv_length=9, config=hf.LlamaConfig())
        attention_forward(module, q, k[:, :, :7], v[:, :, :7], marked)


def test_dropout(calls):
    """Only in training; on average nothing changes; returned weights are those after it; seeded by torch."""
    module, (q, k, v) = module_of().train(), (x[:1].expand(4000, -1, -1, -1) for x in qkv(Sq=3, Skv=6))
    module._forward_hooks = {0: print}
    torch.manual_seed(0)
    context, weights = attention_forward(module, q, k, v, None, dropout=0.25)
    torch.manual_seed(0)
    again, _ = attention_forward(module, q, k, v, None, dropout=0.25)
    other, _ = attention_forward(module, q, k, v, None, dropout=0.25)
    plain, undropped = attention_forward(module.eval(), q[:1], k[:1], v[:1], None, dropout=0.25)
    assert torch.equal(context, again) and not torch.equal(context, other)
    assert [c.p for c in calls.ops] == [0.25, 0.25, 0.25, 0.0]
    assert abs((weights == 0).float().mean().item() - 0.25) < 0.005
    torch.testing.assert_close(torch.where(weights == 0, 0.0, undropped / 0.75), weights)
    torch.testing.assert_close(context.mean(0), plain[0], rtol=0, atol=0.05)


def test_dropout_of_a_model_in_training():
    """Gradients belong to the numbers that forward drew, with checkpointing too."""
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, attention_dropout=0.3, attn_implementation=NAME)).train()
    inputs, found = inputs_of("Llama", "right"), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        found.append(run(model, inputs, use_cache=False))
    assert_same(found[1], found[0])
    torch.manual_seed(6)
    different = run(model, inputs, use_cache=False)["logits"] - found[0]["logits"]
    assert different.abs().max() > 1e-4


@pytest.mark.parametrize("name", ["Llama", "ModernBert", "Bart"])
@pytest.mark.interpreter
def test_on_the_kernel(name, monkeypatch):
    monkeypatch.setattr(interface, "attention_heads", attention_heads_triton)
    with torch.no_grad():
        for wanted in (False, True):
            inputs, flags = inputs_of(name, "left"), {"output_attentions": wanted}
            assert_same(*(run(model_of(name, i), inputs, False, **flags) for i in (NAME, "eager")))


def test_inference_mode(calls):
    with torch.inference_mode():
        ours = model_of("Llama")(**inputs_of("Llama")).logits
    torch.testing.assert_close(ours, model_of("Llama", "eager")(**inputs_of("Llama")).logits, rtol=1e-4, atol=1e-4)
    assert calls.ops
