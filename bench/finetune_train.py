"""`bench finetune`: one case (a task at one dropout) in lock-step: every lane takes a step before the next one begins.

A lane is one implementation with its own optimizer. Lanes start from the same weights and see the same batches; torch's
generator is set to the same number before each lane's step. The lane that goes first changes from step to step, so that
a disturbance of the machine falls on all alike.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers

import bert_fast
from bert_fast.demo import WEIGHTS_INSTALL, DemoError, minilm_dir
from bert_fast.explain import Explanation, explanation

from . import finetune_data as data
from .finetune_data import Batch
from .progress import Progress
from .records import OURS

TRUTH, PEER, AGAIN = "float64", "sdpa", "sdpa, other numbers"  # lanes of transformers' class
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
LR, WARM_UP = 2e-4, 0.1  # the rate rises over a tenth of the steps, then falls to 0, each in a straight line
# BERT's own epsilon: with torch's 1e-8 rounding noise in gradients of almost 0 becomes whole steps, and two runs of one
# class under two implementations of attention part within 50 steps
ADAM_EPS = 1e-6
CHECKED = 10  # steps that are taken in float64 too


@dataclass
class Task:
    """What is fine-tuned on what; batches are on the CPU."""

    name: str
    about: str  # for people
    head: str  # class, of transformers and of bert_fast
    source: Path | None  # folder of the weights; None: a tiny model with random ones
    options: dict[str, Any]  # of the config
    padding: str  # bert_fast's mode
    batch: int  # default size
    steps: int  # default number
    train: Callable[[int, int], list[Batch]]  # (batch size, steps)
    validation: list[Batch]

    def load(self, package: ModuleType, dropout: float) -> torch.nn.Module:
        cls = getattr(package, self.head)
        options = self.options | {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        torch.manual_seed(0)  # a classifier that the checkpoint lacks
        if self.source is None:
            return cls(transformers.BertConfig(**TINY, **options))
        return cls.from_pretrained(str(self.source), **options)


def antiberty_dir() -> Path:
    """Folder with AntiBERTy's vocabulary and weights, found without importing the package."""
    spec = importlib.util.find_spec("antiberty")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(root) / "trained_models" / "vocab.txt").is_file():
            return Path(root) / "trained_models"
    raise DemoError("AntiBERTy's weights are not installed; run: pip install --no-deps antiberty")


def _folder(find: Callable[[], Path], quick: bool) -> Path | None:
    try:
        return find()
    except DemoError as problem:
        if quick:
            return None
        install = str(problem).partition("run: ")[2].partition("\n")[0] or WEIGHTS_INSTALL
        raise DemoError(f"weights are not installed; run: {install}, or use --quick, which does without") from problem


def text_task(quick: bool) -> Task:
    folder = _folder(minilm_dir, quick)
    train, held = data.reviews(data.TRAINING, False), data.reviews(200, True)
    options: dict[str, Any] = {"num_labels": 2}
    if folder is None:
        words: dict[str, int] = {}
        for review in (*train, *held):
            for word in review.text.lower().split():
                words.setdefault(word, len(words) + 1)
        options["vocab_size"] = len(words) + 1
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)

    def encode(texts: list[str]) -> list[list[int]]:
        if folder is None:
            return [[words[word] for word in text.lower().split()] for text in texts]
        return tokenizer(texts)["input_ids"]

    def batches(size: int, steps: int) -> list[Batch]:
        chosen = data.order(len(train), size, steps)
        return [data.review_batch([train[i] for i in at], encode, 0) for at in chosen]

    validation = [data.review_batch(held[i : i + 50], encode, 0) for i in range(0, len(held), 50)]
    model = "a tiny random model" if folder is None else "MiniLM"
    about = f"{model} learns whether the writer of a review is pleased"
    return Task("text", about, "BertForSequenceClassification", folder, options, "auto", 12, 60, batches, validation)


def antibody_task(quick: bool) -> Task:
    folder = _folder(antiberty_dir, quick)
    lines = [*data.SPECIALS, *data.RESIDUES] if folder is None else (folder / "vocab.txt").read_text().split()
    words = {word: index for index, word in enumerate(lines)}
    train, held = data.antibodies(data.TRAINING, False), data.antibodies(60, True)

    def batches(size: int, steps: int) -> list[Batch]:
        chosen = data.order(len(train), size, steps)
        return [data.masked_batch([train[i] for i in at], words, f"step {n}") for n, at in enumerate(chosen)]

    validation = [data.masked_batch(held[i : i + 20], words, f"validation {i}") for i in range(0, len(held), 20)]
    source, options = (None, {"vocab_size": len(words)}) if folder is None else (folder / "AntiBERTy_md_smooth", {})
    model = "a tiny random model" if folder is None else "AntiBERTy"
    about = f"{model} fills in masked residues of synthetic antibodies"
    return Task("antibody", about, "BertForMaskedLM", source, options, "skip", 6, 20, batches, validation)


TASKS = {"text": text_task, "antibody": antibody_task}


@dataclass
class Lane:
    """One implementation under training."""

    name: str
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    dtype: torch.dtype  # bfloat16: autocast
    seed: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def autocast(self) -> contextlib.AbstractContextManager:
        half = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, self.dtype) if half else contextlib.nullcontext()

    def step(self, batch: Batch, number: int, steps: int) -> None:
        """Step `number` of `steps`: forward, backward and the optimizer's on a batch that is on the device."""
        torch.manual_seed(steps * self.seed + number)
        self.optimizer.param_groups[0]["lr"] = LR * rate(number, steps)
        synchronize(self.device)
        start = time.perf_counter()
        with self.autocast():
            loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def validate(self, batches: list[Batch]) -> dict[str, float]:
        """Mean loss and share of right answers; every answer counts the same."""
        right = answers = 0
        loss = 0.0
        self.model.eval()
        with torch.no_grad(), self.autocast():
            for batch in batches:
                out = self.model(**{k: v.to(self.device) for k, v in batch.items()})
                labels = batch["labels"]
                asked = labels != data.IGNORED
                right += int((out.logits.argmax(-1).cpu() == labels)[asked].sum())
                answers += int(asked.sum())
                loss += out.loss.item() * int(asked.sum())
        self.model.train()
        return {"loss": loss / answers, "accuracy": right / answers}


def rate(number: int, steps: int) -> float:
    """Of LR, in 0..1."""
    rise = max(1, round(WARM_UP * steps))
    return (number + 1) / rise if number < rise else (steps - number) / (steps - rise)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def lanes(task: Task, dropout: float, device: torch.device, dtype: torch.dtype) -> list[Lane]:
    """transformers' class and bert_fast's from the same weights, and what the two are held against.

    Without dropout that is transformers' class in float64; with dropout, transformers' class on other random numbers.
    """
    start = task.load(transformers, dropout)
    found = []
    for name in (AGAIN if dropout else TRUTH, PEER, OURS):
        model = task.load(bert_fast if name == OURS else transformers, dropout)
        model.load_state_dict(start.state_dict())
        if name == OURS:
            model.set_padding(task.padding)
        if name == TRUTH:
            model.double()
        model = model.to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=ADAM_EPS, weight_decay=0.01, fused=True)
        found.append(Lane(name, model, optimizer, torch.float64 if name == TRUTH else dtype, 1 + (name == AGAIN)))
    return found


def explained(lane: Lane, batch: Batch) -> Explanation:
    """What a training step of this lane runs."""
    with lane.autocast():
        return explanation(lane.model, **batch)


def run(running: list[Lane], batches: list[Batch], bar: Progress, what: str) -> None:
    device, steps = running[0].device, len(batches)
    for number, batch in enumerate(batches):
        here = {k: v.to(device) for k, v in batch.items()}
        taking = [lane for lane in running if lane.name != TRUTH or number < CHECKED]
        first = number % len(taking)
        for lane in taking[first:] + taking[:first]:
            lane.step(here, number, steps)
        bar.at(f"{what}: " + ", ".join(f"{lane.name} {lane.losses[-1]:.3f}" for lane in taking if lane.name != AGAIN))
        bar.step()
