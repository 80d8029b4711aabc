"""`python -m bench report [FILES...]`: records as one self-contained HTML page, and its plots as PNG files beside it.

The page holds every image itself and loads nothing; each picture has its numbers in the table under it.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import plots
from .progress import Progress
from .records import OURS, RESULTS, Record, RecordError, host_counts, load
from .timing import milliseconds, quantity, say_ceilings

CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --line: #d5d9de; --soft: #5c6670; --good: #0b6e4f }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --paper: #14171a; --line: #3a4047; --soft: #9aa4ae; --good: #62c9a2 }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
       margin: 0 auto; padding: 1rem }
h1, h2, h3 { line-height: 1.25 } h2 { border-top: 1px solid var(--line); padding-top: 1.2rem; margin-top: 2.5rem }
.facts, figcaption, footer { color: var(--soft); font-size: .9rem } code { overflow-wrap: anywhere }
figure { margin: 1.2rem 0 } img { width: 100%; max-width: 47rem; height: auto; background: #fff; border-radius: 6px }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th { vertical-align: bottom } th:first-child, td:first-child, td.text { text-align: left }
.best { font-weight: 600; color: var(--good) }
.spread { color: var(--soft); font-size: .75rem; display: block }
"""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>bert-fast: measurements</title>
<style>{css}</style>
</head>
<body>
<h1>bert-fast: measurements</h1>
<p>Each section is one run on one machine. Numbers of different machines are not to be compared.</p>
{sections}
<footer>Made by <code>python -m bench report</code> from {files}.</footer>
</body>
</html>
"""


def png(figure: plots.Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png")
    plots.pyplot().close(figure)
    return data.getvalue()


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    lines = ["<tr>" + "".join(f"<th>{escape(h).replace('/', '<br>')}</th>" for h in head) + "</tr>"]
    for row in rows:
        lines.append("<tr>" + "".join(c if c.startswith("<td") else f"<td>{c}</td>" for c in row) + "</tr>")
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def time_cell(row: dict[str, Any], name: str, factor: float) -> str:
    t = row["ms"].get(name)
    if t is None:
        return "<td>-</td>"
    best = min(row["ms"], key=lambda n: row["ms"][n]["median"]) == name
    low, high = t["q20"] * factor, t["q80"] * factor
    mark = ' class="best"' if best else ""
    return f'<td{mark}>{t["median"] * factor:.4g}<span class="spread">{low:.4g} to {high:.4g}</span></td>'


def timed_table(record: Record) -> str:
    """Model and kernels: medians with quantiles, the fastest in bold."""
    names = dict.fromkeys(n for r in record["rows"] for n in r["ms"])
    order = [OURS, *(n for n in names if n != OURS)]
    kernels = record["kind"] == "kernels"
    time_unit, factor = ("µs", 1e3) if kernels else ("ms", 1.0)
    head = ["workload", "speed-up", *(f"{n} {time_unit}" for n in order), "rate", "of ceiling"]
    rows = []
    for r in record["rows"]:
        gain = "failed" if not r["ok"] else f"{r['speed_up']:.2f}x" if r["speed_up"] else "-"
        line = [escape(r["workload"]), gain, *(time_cell(r, n, factor) for n in order)]
        of_bytes = kernels and r["bound"] == "copy"
        unit = "B/s" if of_bytes else record.get("unit", "FLOP/s")
        rate = [quantity(r["rate"], unit) if r["ok"] else "-", f"{r['share']:.0%}" if r["ok"] and r["share"] else "-"]
        rows.append(line + rate)
    return table(head, rows)


def memory_table(record: Record) -> str:
    rows = [r for r in record["rows"] if any(v is not None for v in r.get("memory_mib", {}).values())]
    if not rows:
        return ""
    names = dict.fromkeys(n for r in rows for n in r["memory_mib"])
    lines = [[escape(r["workload"]), *(mebibytes(r["memory_mib"].get(n)) for n in names)] for r in rows]
    caption = "Peak memory of a call beyond what was held before it, MiB; pools kept by CUDA graphs are not in it."
    return f"<h3>Memory</h3>\n<p class='facts'>{caption}</p>\n" + table(["workload", *names], lines)


def mebibytes(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def host_table(record: Record) -> str:
    rows = [r for r in record["rows"] if host_counts(r)]
    if not rows:
        return ""
    names = dict.fromkeys(n for r in rows for n in r["host_ms"])
    lines = []
    for r in rows:
        shares = [r[part].get(n) for n in names for part in ("host_ms", "gpu_ms")]
        lines.append([escape(r["workload"]), *map(milliseconds, shares)])
    head = ["workload", *(f"{n}/{part} ms" for n in names for part in ("host", "GPU"))]
    caption = "Small calls: what enqueueing one takes, and what the GPU takes for it when it need not wait for that."
    return f"<h3>Host and GPU</h3>\n<p class='facts'>{caption}</p>\n" + table(head, lines)


def tune_table(record: Record) -> str:
    head = ["table key", "problem", "before µs", "best µs", "before", "best", "written"]
    rows = []
    for r in record["rows"]:
        cells = [f"{t['median'] * 1e3:.4g}" if (t := r["ms"].get(n)) else "-" for n in ("before", "best")]
        tiles = [f'<td class="text">{escape(r[n] or "-")}</td>' for n in ("before", "best")]
        rows.append([escape(r["workload"]), f'<td class="text">{escape(r["problem"])}</td>', *cells, *tiles,
                     "yes" if r["written"] else "no"])  # fmt: skip
    return table(head, rows)


def notes_of(record: Record) -> str:
    found = [(r["workload"], n, why) for r in record["rows"] for n, why in r.get("notes", {}).items()]
    lines = "".join(f"<li>{escape(w)}, {escape(n)}: {escape(why)}</li>" for w, n, why in found)
    return f"<h3>What did not run</h3>\n<ul class='facts'>{lines}</ul>" if found else ""


def title_of(record: Record) -> str:
    parts = [record["kind"], record.get("model"), record.get("dtype")]
    return f"{', '.join(p for p in parts if p)}: {record['environment']['device']}"


def facts(record: Record, path: Path) -> str:
    env = record["environment"]
    versions = ", ".join(f"{n} {env[n]}" for n in ("torch", "cuda", "triton", "transformers", "python") if env.get(n))
    load_note = ""
    if "load" in env:
        load_note = f", {env['threads']} threads, load {env['load']} before and {env.get('load_after', '?')} after "
        load_note += f"on {env['cores']} cores"
    top = record.get("ceilings")
    said = f"<br>{escape(say_ceilings(top))}" if top else ""
    return (
        f"<p class='facts'>{escape(env['device'])}{escape(load_note)}; {escape(versions)}; {escape(env['system'])}"
        f"<br>{escape(env['date'])}: <code>{escape(env['command'])}</code>{said}"
        f"<br>File: {escape(path.name)}</p>"
    )


def section(record: Record, path: Path, folder: Path) -> str:
    """One record; its plots are written into `folder` too."""
    parts = [f"<section>\n<h2>{escape(title_of(record))}</h2>", facts(record, path)]
    if record["kind"] == "tune":
        return "\n".join([*parts, tune_table(record), "</section>"])
    for name, (caption, figure) in plots.figures(record).items():
        data = png(figure)
        (folder / f"{path.stem}-{name}.png").write_bytes(data)
        source = "data:image/png;base64," + base64.b64encode(data).decode()
        alt = escape(f"{name} of {title_of(record)}; the numbers are in the table below", quote=True)
        parts.append(f'<figure><img alt="{alt}" src="{source}">\n<figcaption>{escape(caption)}</figcaption></figure>')
        if name == "speed-up":
            parts.append(timed_table(record))
    if OURS not in {n for r in record["rows"] if r["best_peer"] for n in r["ms"]}:
        parts.append(timed_table(record))  # nothing to draw: the numbers alone
    return "\n".join([*parts, host_table(record), memory_table(record), notes_of(record), "</section>"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help="default: all of bench/results/*.json")
    parser.add_argument("--out", type=Path, default=RESULTS / "report.html", metavar="FILE", help="plots go beside it")


def run(args: argparse.Namespace) -> int:
    paths = args.files or sorted(RESULTS.glob("*.json"))
    if not paths:
        print(f"bench report: no records in {RESULTS}; `python -m bench model` makes one", file=sys.stderr)
        return 2
    try:
        records = [(load(path), path) for path in paths]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        sections = []
        with Progress(len(records), "bench report") as bar:
            for record, path in records:
                sections.append(section(record, path, args.out.parent))
                bar.step()
    except RecordError as problem:
        print(f"bench report: {problem}", file=sys.stderr)
        return 2
    files = ", ".join(escape(path.name) for path in paths)
    args.out.write_text(PAGE.format(css=CSS, sections="\n".join(sections), files=files), encoding="utf-8")
    print(args.out)
    return 0
