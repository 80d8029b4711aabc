"""`python -m bench model | kernels | aot`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

COMMANDS = {
    "model": "the whole model, forward, against eager, SDPA and torch.compile",
    "kernels": "each op at BERT's shapes against torch, with its share of the chip's measured ceiling",
    "aot": "compile every kernel config for GPUs that are not here: registers, spills, shared memory",
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["aot"]:  # has its own options, and runs without a model
        from . import aot

        return aot.main(argv[1:])
    top = argparse.ArgumentParser(prog="python -m bench")
    commands = top.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    parsers = {name: commands.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    from . import kernels, model

    model.add_arguments(parsers["model"])
    kernels.add_arguments(parsers["kernels"])
    args = top.parse_args(argv)
    return {"model": model, "kernels": kernels}[args.command].run(args)


if __name__ == "__main__":
    sys.exit(main())
