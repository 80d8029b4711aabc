"""The tables kernels/<architecture>.json as text: one entry a line; lines not replaced stay as they were."""

from __future__ import annotations

import dataclasses
import json
import re

from bert_fast.kernels.configs import TileConfig

LINE = re.compile(r'  "(?P<key>[^"]+)":(?P<gap> +)\{[^{}]*\},?')
FIRST = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")  # the others follow in the type's order


def entry_text(config: TileConfig) -> str:
    """What has its default is left out."""
    fields = {f.name: f.default for f in dataclasses.fields(config)}
    names = [*FIRST, *(name for name in fields if name not in FIRST)]
    return json.dumps({n: getattr(config, n) for n in names if getattr(config, n) != fields[n]})


def replaced(text: str, entries: dict[str, TileConfig]) -> str:
    """The table's text with these entries; new keys follow the last one of their op, or come last."""
    lines = text.splitlines()[1:-1] if text.strip() else []  # without the braces
    kept = [(m["key"], m["gap"], line.rstrip(",")) for line in lines if (m := LINE.fullmatch(line))]
    if len(kept) != len(lines):
        bad = next(line for line in lines if not LINE.fullmatch(line))
        raise ValueError(f"not one entry a line: {bad!r}")
    column = max((len(key) + len(gap) for key, gap, _ in kept), default=0)
    for key, config in entries.items():
        old = next((i for i, (k, _, _) in enumerate(kept) if k == key), None)
        gap = kept[old][1] if old is not None else " " * max(1, column - len(key))
        new = (key, gap, f'  "{key}":{gap}{entry_text(config)}')
        if old is not None:
            kept[old] = new
            continue
        same = [i for i, (k, _, _) in enumerate(kept) if k.partition("/")[0] == key.partition("/")[0]]
        kept.insert(same[-1] + 1 if same else len(kept), new)
    return "{\n" + ",\n".join(line for _, _, line in kept) + "\n}\n"
