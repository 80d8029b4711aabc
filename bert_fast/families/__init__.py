"""One file an architecture: where its parts are, and which of its classes and heads have a fused form.

Importing a file registers its classes for the class swap. How to write one: CONTRIBUTING.md.
"""

from bert_fast.families import bert, bert_generation, distilbert, electra, mpnet, roberta

__all__ = ["bert", "bert_generation", "distilbert", "electra", "mpnet", "roberta"]
