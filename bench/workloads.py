"""What `bench model` runs: sizes, batches, lengths, and the work they are by formula."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers

SIZES = {  # base and large: bert-base-uncased and bert-large-uncased, random weights; minilm: the packaged weights
    "base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    "minilm": {},
}
POSITIONS = 512  # longer workloads get a model of the same sizes with a longer position table
# Token counts of real text: lognormal, as message lengths are (M. Szell, S. Grauwin, C. Ratti, "Contraction of Online
# Response to Major Events", PLOS ONE 2014, doi 10.1371/journal.pone.0089052). The parameters are this bench's choice:
# a median of a quarter of the padded length, a sigma of the logarithm that puts 4 % of the texts past its end.
LOGNORMAL_MEDIAN = 0.25
LOGNORMAL_SIGMA = 0.8


@dataclass(frozen=True)
class Workload:
    name: str
    batch: int
    seq: int
    lengths: str = "full"  # "full", "uniform" in 1..seq, or "lognormal" clipped to 1..seq
    padding: str = "exact"  # bert_fast's mode; for the other providers it changes nothing
    outputs: tuple[str, ...] = ()  # of "attentions", "hidden_states"
    head: bool = False  # BertForSequenceClassification instead of BertModel

    @property
    def label(self) -> str:
        return f"{self.name} {self.batch}x{self.seq}"

    @property
    def model(self) -> tuple[bool, int]:
        """What has to be loaded: (head, positions)."""
        return self.head, max(self.seq, POSITIONS)

    @property
    def peers_run(self) -> tuple:
        """What the other providers see of it: they know no padding mode."""
        return self.batch, self.seq, self.lengths, self.outputs, self.head


def workloads(size: str, device: str, quick: bool) -> list[Workload]:
    """The runs of a size, ordered so that those of one model stand together."""
    batch, seq = (8, 128) if device == "cpu" else (256, 128) if size == "minilm" else (32, 512)
    dense = Workload("dense", batch, seq)
    text = Workload("lognormal, skip", batch, seq, "lognormal", "skip")
    attentions = Workload("attentions", batch, seq, outputs=("attentions",))
    single, shortest = Workload("dense", 1, 128), Workload("dense", 1, 32)
    if quick and device == "cpu":
        return [dense, text]
    if quick:
        return [dense, text, *([attentions] if size == "base" else []), single, shortest]
    if size == "large" and device != "cpu":
        return [dense, text, single, shortest, Workload("dense", 8, 128)]
    small = [Workload("dense", b, s) for b, s in ((1, 64), (8, 128), (32, 128)) if (b, s) != (batch, seq)]
    return [
        dense,
        text,
        attentions,
        Workload("hidden_states", batch, seq, outputs=("hidden_states",)),
        Workload("uniform, skip", batch, seq, "uniform", "skip"),
        Workload("uniform, exact", batch, seq, "uniform"),
        single,
        shortest,
        *small,
        *([Workload("dense", 4, 2048)] if size == "base" and device != "cpu" else []),
        Workload("classifier, uniform, auto", batch, seq, "uniform", "auto", head=True),
    ]


def lengths_of(work: Workload) -> torch.Tensor:
    """(B,) token counts, the same in every run; the first sequence is full, as after the tokenizer's padding=True."""
    g = torch.Generator().manual_seed(0)
    if work.lengths == "full":
        return torch.full((work.batch,), work.seq)
    if work.lengths == "uniform":
        lengths = torch.randint(1, work.seq + 1, (work.batch,), generator=g)
    else:
        drawn = torch.randn(work.batch, generator=g, dtype=torch.float64)
        lengths = (LOGNORMAL_MEDIAN * work.seq * (LOGNORMAL_SIGMA * drawn).exp()).round().long().clamp(1, work.seq)
    lengths[0] = work.seq
    return lengths


def inputs_of(work: Workload, vocab: int, device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """-> the forward's arguments and the (B,) lengths.

    A dense workload passes no mask: torch.compile cannot see that a mask is all ones and would pay for it.
    """
    ids = torch.randint(0, vocab, (work.batch, work.seq), generator=torch.Generator().manual_seed(1))
    lengths = lengths_of(work)
    if work.lengths == "full":
        return {"input_ids": ids.to(device)}, lengths
    mask = (torch.arange(work.seq) < lengths[:, None]).long()
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}, lengths


def flops(config: transformers.BertConfig, lengths: torch.Tensor, labels: int = 0) -> float:
    """FLOP of the real tokens' matrix products; a padded peer spends more, its rate here is what it delivers.

    Per layer n (8 H^2 + 4 H I) + 4 H sum_b n_b^2 with n = sum_b n_b; 2 B H^2 for the pooler, 2 B H labels for a head.
    All layers count in full, also where a head needs only the first tokens of the last one.
    """
    h, inner, n = config.hidden_size, config.intermediate_size, lengths.sum().item()
    layer = n * (8 * h * h + 4 * h * inner) + 4 * h * lengths.square().sum().item()
    return config.num_hidden_layers * layer + 2 * len(lengths) * h * (h + labels)


def least_bytes(config: transformers.BertConfig, work: Workload, lengths: torch.Tensor, size: int) -> float:
    """Bytes that any implementation moves: encoder and pooler weights and one embedding row a token read once, the
    outputs asked for written once; `size` bytes an element."""
    h, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    layer = 4 * (h * h + h) + 2 * h * inner + inner + h + 4 * h
    written = 0 if work.head else work.batch * work.seq * h
    written *= 1 + layers * ("hidden_states" in work.outputs)
    if "attentions" in work.outputs:
        written += layers * work.batch * config.num_attention_heads * work.seq**2
    return size * (layers * layer + h * h + h + lengths.sum().item() * h + written)
