"""`python -m bert_fast demo`, `doctor` and `embed`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

EMBED_MODULES = ("sentence_transformers", "pyarrow", "tqdm")


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value}, expected 1 or more")
    return value


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bert_fast", description="BERT on fused kernels.")
    commands = top.add_subparsers(dest="command", required=True, metavar="{demo,doctor,embed}")
    demo = commands.add_parser("demo", help="real weights through bert_fast and transformers' eager, side by side")
    demo.add_argument("--model", metavar="DIR_OR_ID", help="folder or hub name (default: the packaged MiniLM)")
    demo.add_argument("--text", action="append", metavar="TEXT", help="a sentence; repeat it for a batch")
    demo.add_argument("--attentions", action="store_true", help="print the attention map of one head")
    demo.add_argument("--padding", choices=("auto", "exact", "skip"), default="auto", help="default: auto")
    demo.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    demo.add_argument("--device", metavar="cpu|cuda[:N]", help="default: cuda where there is one")
    commands.add_parser("doctor", help="versions, GPU, how each op runs here, what is missing")
    embed = commands.add_parser("embed", help="an embedding for every row of a file; goes on after a kill")
    embed.add_argument("input", type=Path, metavar="INPUT", help=".txt (a row a line), .jsonl or .parquet")
    embed.add_argument("output", type=Path, metavar="OUTPUT", help=".jsonl, .parquet, or .npy (embeddings alone)")
    embed.add_argument("--model", metavar="DIR_OR_ID", help="a SentenceTransformer (default: the packaged MiniLM)")
    embed.add_argument("--column", default="text", metavar="NAME", help="the column with the text (default: text)")
    embed.add_argument("--batch-size", type=positive, default=32, metavar="N", help="default: 32")
    embed.add_argument("--normalize", action="store_true", help="embeddings of length 1")
    embed.add_argument("--device", metavar="cpu|cuda[:N]", help="default: cuda where there is one")
    embed.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    embed.add_argument("--shard-rows", type=positive, default=4096, metavar="N", help="a kill costs at most N rows")
    embed.add_argument("--restart", action="store_true", help="drop an unfinished run, replace OUTPUT")
    embed.add_argument("--ray", action="store_true", help="on a Ray cluster, or a local Ray without --ray-address")
    embed.add_argument("--ray-address", metavar="ADDRESS", help="a running cluster: auto, HOST:PORT or ray://HOST:PORT")
    embed.add_argument("--workers", type=positive, metavar="N", help="default: as many as the cluster has GPUs or CPUs")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.command == "demo":
        from . import demo

        return demo.run(args)
    if args.command == "embed":
        try:
            from . import embed
        except ModuleNotFoundError as problem:
            if (problem.name or "").partition(".")[0] not in EMBED_MODULES:
                raise
            print(f"bert_fast embed: {problem.name} is missing; run: pip install 'bert-fast[embed]'", file=sys.stderr)
            return 2
        return embed.run(args)
    from . import doctor

    return doctor.run()


if __name__ == "__main__":
    sys.exit(main())
