"""One file an architecture: where its parts are, and which of its classes and heads have a fused form.

Importing a file registers its classes for the class swap. How to write one: CONTRIBUTING.md. On a release of
transformers that nobody tested, a file that does not fit it is left out, and its models stay transformers' own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import transformers

from bert_fast.installed import is_tested
from bert_fast.modeling import SWAPS

LEFT_OUT: dict[str, str] = {}  # what of bert_fast is not there -> why


@contextmanager
def left_out_where_it_does_not_fit(what: str) -> Iterator[None]:
    """Around an import. On a tested release, what it raises is a defect of ours."""
    try:
        yield
    except Exception as problem:
        if is_tested():
            raise
        LEFT_OUT[what] = f"{type(problem).__name__}: {problem}"
        logging.getLogger("bert_fast").warning(
            "transformers %s was not tested, and %s does not fit it; transformers' own code runs instead (%s)",
            *(transformers.__version__, what, LEFT_OUT[what]),
        )


with left_out_where_it_does_not_fit("BERT"):
    from bert_fast.families import bert  # noqa: F401
with left_out_where_it_does_not_fit("BertGeneration"):
    from bert_fast.families import bert_generation  # noqa: F401
with left_out_where_it_does_not_fit("DistilBERT"):
    from bert_fast.families import distilbert  # noqa: F401
with left_out_where_it_does_not_fit("ELECTRA"):
    from bert_fast.families import electra  # noqa: F401
with left_out_where_it_does_not_fit("MPNet"):
    from bert_fast.families import mpnet  # noqa: F401
with left_out_where_it_does_not_fit("RoBERTa"):
    from bert_fast.families import roberta  # noqa: F401
with left_out_where_it_does_not_fit("XLM-RoBERTa"):
    from bert_fast.families import xlm_roberta  # noqa: F401
with left_out_where_it_does_not_fit("CamemBERT"):
    from bert_fast.families import camembert  # noqa: F401


def drop_ins(names: Iterable[str]) -> dict[str, Any]:
    """Name -> our class, or transformers' own of that name; without those that transformers has not got."""
    found = {}
    for name in names:
        try:
            upstream = getattr(transformers, name)
        except Exception:  # whatever its module raises when it is imported
            if is_tested():
                raise
        else:
            found[name] = SWAPS.get(upstream, upstream)
    return found
