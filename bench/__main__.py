"""`python -m bench model | kernels | tune | finetune | sentences | compare | report | aot`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "model": "the whole model, forward, against eager, SDPA and torch.compile",
    "kernels": "each op at BERT's shapes against torch, with its share of the machine's measured ceiling",
    "tune": "search tiles on this GPU and write them into its table in kernels/",
    "finetune": "a fine-tune of transformers' class and of bert_fast's: loss curves, accuracy, time of a step",
    "sentences": "sentence-transformers' encode and a transformers pipeline, before and after bert_fast.accelerate",
    "compare": "two records of one machine: what got faster, what got slower",
    "report": "records as one HTML page with plots, and the plots as PNG",
    "aot": "compile every kernel config for GPUs that are not here: registers, spills, shared memory",
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["aot"]:  # has its own options
        from . import aot

        return aot.main(argv[1:])
    top = argparse.ArgumentParser(prog="python -m bench")
    commands = top.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    named = [name for name in argv[:1] if name in COMMANDS]  # a command pays for its own imports only
    for name, text in COMMANDS.items():
        parser = commands.add_parser(name, help=text, description=text)
        if name in named:
            importlib.import_module(f"bench.{name}").add_arguments(parser)
    args = top.parse_args(argv)
    return importlib.import_module(f"bench.{args.command}").run(args)


if __name__ == "__main__":
    sys.exit(main())
