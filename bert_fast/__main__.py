"""`python -m bert_fast demo` and `python -m bert_fast doctor`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bert_fast", description="BERT on fused kernels.")
    commands = top.add_subparsers(dest="command", required=True, metavar="{demo,doctor}")
    demo = commands.add_parser("demo", help="real weights through bert_fast and transformers' eager, side by side")
    demo.add_argument("--model", metavar="DIR_OR_ID", help="folder or hub name (default: the packaged MiniLM)")
    demo.add_argument("--text", action="append", metavar="TEXT", help="a sentence; repeat it for a batch")
    demo.add_argument("--attentions", action="store_true", help="print the attention map of one head")
    demo.add_argument("--padding", choices=("auto", "exact", "skip"), default="auto", help="default: auto")
    demo.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    demo.add_argument("--device", metavar="cpu|cuda[:N]", help="default: cuda where there is one")
    commands.add_parser("doctor", help="versions, GPU, how each op runs here, what is missing")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.command == "demo":
        from . import demo

        return demo.run(args)
    from . import doctor

    return doctor.run()


if __name__ == "__main__":
    sys.exit(main())
