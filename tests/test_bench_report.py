"""report on made-up records: a page that needs nothing but itself, figures without a cut or covered word."""

from __future__ import annotations

import base64
import builtins
from html.parser import HTMLParser

import bench_records as made
import pytest

from bench import plots, records, report
from bench.__main__ import main
from bench.records import OURS

pytest.importorskip("matplotlib", reason="pip install 'bert-fast[bench]'")
PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """Images, links and what else a page would load."""

    def __init__(self, text):
        super().__init__()
        self.images, self.others, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "img":
            self.images.append(attrs)
        elif {"src", "href", "srcset", "data"} & attrs.keys() or tag in ("script", "link", "iframe", "object"):
            self.others.append((tag, attrs))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"


TUNE_ROW = {"workload": "gemm/rows<=128 wide/half", "problem": "128x3072x768", "before": '{"BLOCK_M": 32}'}
TUNE_ROW |= {"best": '{"BLOCK_M": 64}', "written": True, "best_peer": None, "notes": {}}
TUNE_ROW["ms"] = {"before": made.timing(0.011), "best": made.timing(0.009)}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    found = [("model.json", made.model_record()), ("kernels.json", made.kernels_record())]
    tune = {k: v for k, v in made.model_record().items() if k != "ceilings"} | {"kind": "tune", "rows": [TUNE_ROW]}
    paths = [str(made.write(folder / name, r)) for name, r in (*found, ("tune.json", tune))]
    assert main(["report", *paths, "--out", str(folder / "page.html")]) == 0
    return folder


def test_report_holds_its_images_and_loads_nothing(page):
    text = (page / "page.html").read_text()
    parsed = Page(text)
    assert not parsed.open and not parsed.others
    assert "url(" not in text and "@import" not in text and "http" not in text
    pictures = [base64.b64decode(i["src"].removeprefix("data:image/png;base64,")) for i in parsed.images]
    assert len(pictures) == 5 and all(p.startswith(PNG) and len(p) > 5000 for p in pictures)
    assert all(i["alt"] for i in parsed.images)
    files = {p.name: p.read_bytes() for p in page.glob("*.png")}
    assert set(files) == {f"model-{n}.png" for n in ("speed-up", "roofline", "latency")} | {
        f"kernels-{n}.png" for n in ("speed-up", "roofline")
    }
    assert set(files.values()) == set(pictures)


def test_report_has_the_numbers_and_where_they_are_from(page):
    text = (page / "page.html").read_text()
    record = made.model_record()
    for row in record["rows"]:
        for word in (row["workload"], f"{row['ms'][OURS]['median']:.4g}", f"{row['speed_up']:.2f}x"):
            assert word in text
    for word in ("Made-up GPU", "torch 2.11", "python -m bench model", "2000-01-01", "copy 3 TB/s, 8192³"):
        assert word in text
    assert "RuntimeError: &lt;made up&gt; &amp; long" in text  # escaped
    assert "gemm/rows&lt;=128 wide/half" in text and "{&quot;BLOCK_M&quot;: 64}" in text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text and "overflow-x: auto" in text


def test_report_of_a_run_that_failed(tmp_path):
    record = made.model_record()
    record["rows"] = record["rows"][:1]
    record["rows"][0] |= {"ms": {}, "best_peer": None, "ok": False, "speed_up": None, "rate": None, "share": None}
    record["rows"][0]["memory_mib"] = {}
    path = made.write(tmp_path / "failed.json", record)
    assert main(["report", str(path), "--out", str(tmp_path / "r.html")]) == 0
    assert "failed" in (tmp_path / "r.html").read_text() and not list(tmp_path.glob("*.png"))


def test_report_takes_all_committed_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert main(["report", "--out", str(tmp_path / "r.html")]) == 2
    assert "no records" in capsys.readouterr().err
    made.write(tmp_path / "one.json", made.model_record("large"))
    assert main(["report", "--out", str(tmp_path / "r.html")]) == 0
    assert "one.json" in (tmp_path / "r.html").read_text()


def test_committed_results_can_be_read():
    for path in records.RESULTS.glob("*.json"):
        assert records.load(path)["rows"]


def test_matplotlib_is_asked_for_when_absent(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    path = str(made.write(tmp_path / "a.json", made.model_record()))
    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["report", path, "--out", str(tmp_path / "r.html")]) == 2
    assert "pip install 'bert-fast[bench]'" in capsys.readouterr().err
    assert main(["compare", path, path]) == 0  # needs none


def test_error_bars_hold_both_spreads():
    row = {"ms": {OURS: {"median": 2.0, "q20": 1.0, "q80": 4.0}, "sdpa": {"median": 4.0, "q20": 3.0, "q80": 8.0}}}
    assert plots.gain(row | {"best_peer": "sdpa"}) == (2.0, 0.75, 8.0)


@pytest.mark.parametrize("record", [made.model_record(), made.kernels_record()], ids=["model", "kernels"])
def test_no_word_of_a_figure_is_cut_or_under_another(record):
    from matplotlib.text import Text

    for name, (_, figure) in plots.figures(record).items():
        figure.canvas.draw()
        axes, renderer = figure.axes[0], figure.canvas.get_renderer()
        words = [*axes.texts, axes.xaxis.label, axes.yaxis.label]
        words += axes.get_yticklabels() if name == "speed-up" else []
        boxes = {t: Text.get_window_extent(t, renderer) for t in words if t.get_text()}
        width, height = figure.canvas.get_width_height()
        for text, box in boxes.items():
            assert min(box.x0, box.y0) > -2 and box.x1 < width + 2 and box.y1 < height + 2, (name, text)
        upright = [(t.get_text(), box.shrunk(0.9, 0.9)) for t, box in boxes.items() if t.get_rotation() in (0, 90)]
        hits = [(t, s) for i, (t, a) in enumerate(upright) for s, b in upright[:i] if a.overlaps(b)]
        assert not hits, (name, hits)
        plots.pyplot().close(figure)
