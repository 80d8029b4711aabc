"""Set before any test: no network, Triton interpreted where there is no GPU, uninitialised memory poisoned."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest
import recorder
import torch

recorder.install()  # before bert_fast is imported
os.environ["HF_HUB_OFFLINE"] = "1"  # weights come from installed packages
HAS_CUDA = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton reads it when a kernel is decorated, so it holds for the whole process; with it, a GPU machine interprets too
INTERPRETED = not HAS_CUDA or os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED and HAS_TRITON:
    assert "triton" not in sys.modules, "Triton was imported before its interpreter could be switched on"
    os.environ["TRITON_INTERPRET"] = "1"
    from interpreter import repair

    repair()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreter: runs Triton kernels on CPU tensors")
    config.addinivalue_line("markers", "unpoisoned: uninitialised memory is left as it is")
    # `poison` below makes torch say so of operations that are not part of a test's claim
    config.addinivalue_line("filterwarnings", "ignore:.*deterministic:UserWarning")
    # numpy warns of exp2 overflowing and of log2(0), where inf is the right number
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why_no_gpu = "no CUDA device" if not HAS_CUDA else "TRITON_INTERPRET=1: kernels are not compiled"
    why_no_interpreter = (
        "kernels are compiled here and the GPU tests run them; TRITON_INTERPRET=1 interprets them instead"
        if HAS_TRITON
        else "Triton is not installed"
    )
    for item in items:
        if INTERPRETED and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=why_no_gpu))
        if not (INTERPRETED and HAS_TRITON) and item.get_closest_marker("interpreter"):
            item.add_marker(pytest.mark.skip(reason=why_no_interpreter))


@pytest.fixture(autouse=True)
def poison(request: pytest.FixtureRequest) -> Iterator[None]:
    """Uninitialised memory holds NaN, integers their largest value: what a kernel fails to write shows.

    Done by torch itself in the allocation, so it reaches new_empty, empty_like and the temporaries of torch's own
    operators, on the CPU and the GPU.
    """
    if request.node.get_closest_marker("unpoisoned"):
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
