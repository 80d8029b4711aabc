"""Runs of `bert_fast embed` that kill themselves, each at its point; test_embed.py starts them all as one process.

embed_killed.py CASES: a JSON list of [point, arguments]; prints the list of their exit codes. A point is
"torn NAME" (half of the file is written), "before NAME" or "after NAME" (it gets its name), or "cleaning".
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from bert_fast import embed
from bert_fast.__main__ import main


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(what: str, name: str = "") -> None:
    fsync, replace = os.fsync, os.replace

    def torn(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path.name.startswith(name) and path.suffix == ".tmp":
            os.ftruncate(fd, os.fstat(fd).st_size // 2)
            die()
        fsync(fd)

    def replaced(source: Path, target: Path) -> None:
        here = target.name.startswith(name)
        if here and what == "before":
            die()
        replace(source, target)
        if here and what == "after":
            die()

    if what == "torn":
        os.fsync = torn
    elif what == "cleaning":
        shutil.rmtree = die
    else:
        os.replace = replaced


def run(point: str, arguments: list[str]) -> int:
    """In a process of its own, a fork: importing everything once is the slow part."""
    child = os.fork()
    if not child:
        arm(*point.split())
        os._exit(main(arguments))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    assert embed  # main would import it in every fork
    print(json.dumps([run(point, arguments) for point, arguments in json.loads(sys.argv[1])]))
