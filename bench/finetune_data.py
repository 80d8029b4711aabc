"""What `bench finetune` learns: two small data sets made by rule, the same in every run, and batches of them.

**Reviews** (two classes). A review quotes somebody's opinion of a thing and gives the writer's own; neutral sentences
of varying length stand around them. Each opinion is an adjective, good or bad, and "not" turns it round. The label is
the writer's opinion: 1 for a good adjective without "not" or a bad one with it. "not" stands in one opinion of four;
it, the quoted opinion and the label are balanced against each other, so that no word tells the label: whose opinion is
whose does, and where "not" stands. A pair of thing and adjective in the writer's opinion of a training review is in no
validation review.

**Antibodies** (masked residues). Five human frameworks; a family is one of them with substitutions of its own at
DESIGNED places, which all its members share: they are what there is to learn. A member draws a random residue at every
place with probability MUTATED, a random third loop of 5 to 20 residues, and in half of the cases it lacks up to 30
residues at its start, as a read that begins inside the first framework does. 15 % of the residues are to be
predicted: of these 80 % are [MASK], 10 % a random residue, 10 % as they were (BERT's rule). Validation sequences are of
the same families and equal to no training sequence.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

THINGS = "battery camera screen keyboard speaker handle zip strap lamp chair kettle blender tent bicycle jacket".split()
ADJECTIVES = (  # bad, good
    "bad poor terrible awful useless weak disappointing flimsy annoying ugly".split(),
    "good great excellent wonderful useful strong impressive sturdy pleasant beautiful".split(),
)
OTHERS = ("my brother", "my neighbour", "the shop", "a friend of mine", "everybody at work", "the magazine I read")
BEFORE = (
    "",
    "It came on a Tuesday.",
    "I have used it nearly every day since spring.",
    "We ordered two, one for the house and one for the garden.",
)
AFTER = (
    "",
    "That is all.",
    "The colour is the one in the picture.",
    "It weighs a kilogram, and the manual is in four languages.",
)
FORMS = (  # {other}, {thing}, {theirs}, {mine}: an opinion is an adjective with or without "not"
    "{other} says that the {thing} is {theirs}, but I find it {mine}.",
    "I find the {thing} {mine}, though {other} says that it is {theirs}.",
    "The {thing} is {mine} to me; {other} calls it {theirs}.",
    "{other} calls the {thing} {theirs}; to me it is {mine}.",
)
HELD_OUT = 5  # one pair of thing and adjective in so many is for validation

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
FRAMEWORKS = (  # up to the third loop, and after it: heavy chains (human VH3, VH1, VH4), kappa, lambda
    "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAK WGQGTLVTVSS",
    "QVQLVQSGAEVKKPGASVKVSCKASGYTFTSYYMHWVRQAPGQGLEWMGIINPSGGSTSYAQKFQGRVTMTRDTSTSTVYMELSSLRSEDTAVYYCAR WGQGTLVTVSS",
    "QVQLQESGPGLVKPSETLSLTCTVSGGSISSYYWSWIRQPPGKGLEWIGYIYYSGSTNYNPSLKSRVTISVDTSKNQFSLKLSSVTAADTAVYYCAR WGRGTLVTVSS",
    "DIQMTQSPSSLSASVGDRVTITCRASQSISSYLNWYQQKPGKAPKLLIYAASSLQSGVPSRFSGSGSGTDFTLTISSLQPEDFATYYCQQ FGQGTKVEIK",
    "QSVLTQPPSASGTPGQRVTISCSGSSSNIGSNTVNWYQQLPGTAPKLLIYSNNQRPSGVPDRFSGSKSGTSASLAISGLQSEDEADYYCAA FGGGTKLTVL",
)
DESIGNED, MUTATED, CUT = 16, 0.02, 30
MASKED, AS_MASK, AS_RANDOM = 0.15, 0.8, 0.1
TRAINING = 800  # examples of either data set
IGNORED = -100  # the label that transformers' losses leave out
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Review:
    text: str
    label: int
    pair: tuple[str, str]  # thing and adjective of the writer's opinion


def opinion(adjective: str, negated: bool) -> str:
    return f"not {adjective}" if negated else adjective


def reviews(count: int, validation: bool, seed: int = 0) -> list[Review]:
    """`count` different reviews, as many of either label (one more of label 0 where `count` is odd)."""
    drawn = random.Random(f"reviews {validation} {seed}")
    pairs = [[], []]  # by how good the adjective is
    for good, adjectives in enumerate(ADJECTIVES):
        for i in range(len(THINGS) * len(adjectives)):
            thing, adjective = divmod(i, len(adjectives))
            if ((thing + adjective) % HELD_OUT == 0) == validation:
                pairs[good].append((THINGS[thing], adjectives[adjective]))
    found: dict[str, Review] = {}
    while len(found) < count:
        turn = len(found)
        label, theirs_good = turn & 1, turn >> 1 & 1
        negated, theirs_negated = turn >> 2 & 3 == 0, turn >> 4 & 3 == 0  # one in four
        thing, adjective = drawn.choice(pairs[label ^ negated])
        words = {"thing": thing, "other": drawn.choice(OTHERS), "mine": opinion(adjective, negated)}
        words["theirs"] = opinion(drawn.choice(ADJECTIVES[theirs_good]), theirs_negated)
        core = drawn.choice(FORMS).format(**words)
        text = " ".join(filter(None, (drawn.choice(BEFORE), core[0].upper() + core[1:], drawn.choice(AFTER))))
        found.setdefault(text, Review(text, label, (thing, adjective)))
    made = list(found.values())
    drawn.shuffle(made)
    return made


def families() -> list[tuple[str, str]]:
    drawn, made = random.Random("families"), []
    for start, end in map(str.split, FRAMEWORKS):
        letters = list(start)
        for place in drawn.sample(range(CUT, len(letters)), DESIGNED):
            letters[place] = drawn.choice(RESIDUES.replace(letters[place], ""))
        made.append(("".join(letters), end))
    return made


def antibodies(count: int, validation: bool, seed: int = 0) -> list[str]:
    """`count` different sequences, the families in turns."""
    known = set(antibodies(TRAINING, False, seed)) if validation else set()
    drawn, parents = random.Random(f"antibodies {validation} {seed}"), families()
    made: list[str] = []
    while len(made) < count:
        start, end = parents[len(made) % len(parents)]
        loop = "".join(drawn.choices(RESIDUES, k=drawn.randint(5, 20)))
        letters = [drawn.choice(RESIDUES) if drawn.random() < MUTATED else x for x in start + loop + end]
        text = "".join(letters[drawn.randint(0, CUT) if drawn.random() < 0.5 else 0 :])
        if text not in known:
            known.add(text)
            made.append(text)
    drawn.shuffle(made)
    return made


def order(examples: int, batch: int, steps: int, seed: int = 0) -> list[list[int]]:
    """Indices of every step's batch: shuffled epochs one after the other, every batch full."""
    drawn, found = random.Random(f"order {seed}"), []
    while len(found) < batch * steps:
        found += drawn.sample(range(examples), examples)
    return [found[i * batch : (i + 1) * batch] for i in range(steps)]


def padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


Encode = Callable[[list[str]], list[list[int]]]


def review_batch(chosen: Sequence[Review], encode: Encode, pad: int) -> Batch:
    """encode: texts to token ids, specials included."""
    ids = encode([review.text for review in chosen])
    batch = {"input_ids": padded(ids, pad), "attention_mask": padded([[1] * len(row) for row in ids], 0)}
    return batch | {"labels": torch.tensor([review.label for review in chosen])}


def residue_ids(text: str, words: dict[str, int]) -> list[int]:
    return [words["[CLS]"], *(words[x] for x in text), words["[SEP]"]]


def masked_batch(chosen: Sequence[str], words: dict[str, int], seed: str) -> Batch:
    """seed: which residues are masked, and as what; the same batch with the same seed is masked alike."""
    drawn, residues = random.Random(f"mask {seed}"), [words[x] for x in RESIDUES]
    rows, labels = [], []
    for text in chosen:
        row = residue_ids(text, words)
        label = [IGNORED] * len(row)
        for place in drawn.sample(range(1, len(row) - 1), max(1, round(MASKED * len(text)))):
            label[place], how = row[place], drawn.random()
            if how < AS_MASK:
                row[place] = words["[MASK]"]
            elif how < AS_MASK + AS_RANDOM:
                row[place] = drawn.choice(residues)
        rows.append(row)
        labels.append(label)
    batch = {"input_ids": padded(rows, words["[PAD]"]), "attention_mask": padded([[1] * len(r) for r in rows], 0)}
    return batch | {"labels": padded(labels, IGNORED)}
