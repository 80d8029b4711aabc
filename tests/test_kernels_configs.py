"""Tile choices: a pure lookup that always finds a valid tile, the generic one for an architecture without a table."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import FrozenInstanceError

import pytest
import torch
from kernel_helpers import DTYPES

from bert_fast.kernels import configs
from bert_fast.kernels.configs import FOLDER, TileConfig, choose, gemm_class, row_class

ARCHITECTURES = sorted(path.stem for path in FOLDER.glob("*.json"))
ROWS = (*(f"rows<={n}" for n in (32, 128, 512, 1024, 2048, 8192)), "rows>8192")
PRODUCTS = [f"{rows} {form}" for rows in ROWS for form in ("wide", "narrow", "narrow-long")]
DIMS = ("dim<=64", "dim<=128")
SHAPE_CLASSES = {"attention": DIMS, "attention_probs": DIMS, "pool": ("any",)}
SHAPE_CLASSES |= {"attention_backward": DIMS, "attention_backward_probs": DIMS}
GRADIENTS = ("rows<=1024", "rows<=8192", "rows>8192", "unaligned")
REQUESTS = [(op, s, dtype) for op, shapes in SHAPE_CLASSES.items() for s, dtype in itertools.product(shapes, DTYPES)]
REQUESTS += [("gemm", s, dtype) for s, dtype in itertools.product(PRODUCTS, DTYPES[1:])] + [("gemm", "any", DTYPES[0])]
REQUESTS += [(op, s, t) for op in ("grad_input", "grad_weight") for s in GRADIENTS for t in DTYPES[1:]]
REQUESTS += [(op, "any", DTYPES[0]) for op in ("grad_input", "grad_weight")]


def test_tables_are_where_they_are_looked_for() -> None:
    assert "generic" in ARCHITECTURES
    assert all(re.fullmatch(r"generic|sm\d{2,3}", name) for name in ARCHITECTURES)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_entries(arch: str) -> None:
    """Every key can be asked for, every tile is one a kernel takes; a typing error in a key would never be found."""
    known = {f"{op}/{shape}/{configs.dtype_class(dtype)}" for op, shape, dtype in REQUESTS}
    entries = json.loads((FOLDER / f"{arch}.json").read_text())
    assert entries.keys() <= known and (arch != "generic" or entries.keys() == known)
    for key, entry in entries.items():
        config = TileConfig(**entry)
        sizes = [config.BLOCK_M, config.BLOCK_N]
        if key.startswith(("gemm", "pool", "grad")):
            sizes.append(config.BLOCK_K)
        else:
            assert config.BLOCK_K == 0, f"{key}: attention has no inner tile"
        assert all(n >= 16 and n & (n - 1) == 0 for n in sizes), key
        assert config.num_warps in (2, 4, 8) and 1 <= config.num_stages <= 8, key
        assert config.SPLIT_K == 1 or key.startswith("gemm/") and "narrow" in key, key
        if config.tma:
            assert arch not in ("generic", "sm80") and key.startswith(("gemm", "grad")) and key.endswith("half"), key


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0), (99, 9), (0, 0)])
def test_every_request_finds_a_tile(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same one every time, without a question to any device."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", None)
    monkeypatch.setattr(torch.cuda, "current_device", None)
    for request in REQUESTS:
        assert choose(*request, capability) == choose(*request, capability)


def test_unknown_architecture_gets_the_generic_tiles() -> None:
    generic = {key: TileConfig(**e) for key, e in json.loads((FOLDER / "generic.json").read_text()).items()}
    assert configs.table("sm999") == generic


@pytest.mark.parametrize("arch", [name for name in ARCHITECTURES if name != "generic"])
def test_own_entries_go_first(arch: str) -> None:
    own = {key: TileConfig(**e) for key, e in json.loads((FOLDER / f"{arch}.json").read_text()).items()}
    table = configs.table(arch)
    assert own.items() <= table.items()
    assert {k: v for k, v in table.items() if k not in own}.items() <= configs.table("generic").items()


@pytest.mark.parametrize("rows,name", [(0, 0), (1, 0), (32, 0), (33, 1), (2048, 4), (8192, 5), (8193, 6), (2**31, 6)])
def test_row_classes(rows: int, name: int) -> None:
    assert row_class(rows) == ROWS[name]


def test_forms_of_products() -> None:
    """BERT-base's five: three projections, output projection, up and down; and MiniLM's down."""
    assert gemm_class(128, 2304, 768) == gemm_class(128, 3072, 768) == "rows<=128 wide"
    assert gemm_class(8193, 768, 768) == "rows>8192 narrow"
    assert gemm_class(1, 768, 3072) == gemm_class(32, 384, 1536) == "rows<=32 narrow-long"


def test_wrong_tiles() -> None:
    for sizes in ((48, 64), (64, 8), (0, 64)):
        with pytest.raises(ValueError, match="expected a power of two from 16 on"):
            TileConfig(*sizes, num_warps=4, num_stages=2)
    with pytest.raises(ValueError, match="BLOCK_M=32 with tma: wgmma needs 64 rows"):
        TileConfig(32, 64, num_warps=4, num_stages=2, tma=True)
    for split, tma in ((0, False), (2, True)):
        with pytest.raises(ValueError, match=f"SPLIT_K={split}, tma={tma}"):
            TileConfig(64, 64, num_warps=4, num_stages=2, SPLIT_K=split, tma=tma)
    with pytest.raises(FrozenInstanceError):
        TileConfig(64, 64, num_warps=4, num_stages=2).BLOCK_M = 32  # type: ignore[misc]
