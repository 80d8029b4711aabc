"""The progress bar of every long command."""

from __future__ import annotations

from typing import Any


class Progress:
    """A bar on a terminal that has tqdm, else nothing; `say` prints a line above it."""

    def __init__(self, total: int, what: str) -> None:
        self._bar: Any = None
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self._bar = tqdm(total=total, desc=what, disable=None, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def at(self, what: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(what)

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)
        if self._bar is not None:
            self._bar.refresh()
