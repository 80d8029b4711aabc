"""A release of transformers that nobody tested: a family is compared with it before it is first taken.

The tests have run on the releases of `installed.TESTED_RELEASES`. On any other one, the first use of a family in a
process compares tiny models (trial.py), once; the verdict is kept in the user's cache folder (verdicts.py). A family
that differs stays transformers' own code, and one warning says what differed.

The comparison runs in a thread of its own, where no mode, transform or default device of the caller's is. What somebody
has changed for the whole process puts it off: that call runs transformers' code, and the next one asks again.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from bert_fast.comparison import verdicts
from bert_fast.comparison.trial_parts import differences
from bert_fast.comparison.twins import NotNow
from bert_fast.family import Family
from bert_fast.installed import is_tested
from bert_fast.surroundings import surroundings_reason
from bert_fast.tiers import warn_once

_RELEASE = f"transformers {transformers.__version__}"
_COMPILED = f"{_RELEASE} is not compared while a call is being compiled"
_NN_MODULE = vars(nn.modules.module)  # the globals of what torch itself has in nn.Module


class Verdict(NamedTuple):
    """How a family differs, or None. lasting: every process would find the same; else models could not be compared."""

    difference: str | None
    lasting: bool = True


class _Comparing(threading.local):
    """Whether this thread compares; its models are ours in any case."""

    on = False


_here = _Comparing()
_verdicts: dict[Family, str | None] = {}
_lock = threading.Lock()


def difference(family: Family) -> str | None:
    """Why a family runs transformers' own code, or None; the first call compares."""
    if torch.compiler.is_compiling():
        return _COMPILED
    if _here.on:
        return None
    if family not in _verdicts:
        with _lock:
            if family not in _verdicts:
                try:
                    _verdicts[family] = _decide(family)
                except NotNow as why:
                    return f"{_RELEASE} is not compared yet: {why}"
    return _verdicts[family]


def _decide(family: Family) -> str | None:
    kept = verdicts.read(family)
    if kept is None:
        verdict = compare(family)
        if verdict.lasting:
            verdicts.write(family, verdict.difference)
    else:
        verdict = Verdict(kept.difference)
    if verdict.difference is None:
        return None
    reason = f"{_RELEASE} was not tested and differs: {verdict.difference}"
    warn_once(reason)
    return reason


def compare(family: Family) -> Verdict:
    """Compare now, whatever the release and whatever was found before.

    Raises NotNow where something holds for the whole process that models of transformers may not be meant for.
    """
    return _in_thread(lambda: _compared(family))


def _compared(family: Family) -> Verdict:
    """A difference counts when it is found twice: another thread may have changed something in between."""
    _use_one_thread()
    for _ in range(2):
        _check_process()
        try:
            verdict = Verdict(next(differences(family), None))
        except NotNow:
            raise
        except Exception as problem:
            verdict = Verdict(f"{type(problem).__name__}: {problem}", lasting=False)
        _check_process()
        if verdict.difference is None:
            break
    return verdict


def _check_process() -> None:
    for register in (nn.Module.register_parameter, nn.Module.register_buffer):
        if getattr(register, "__globals__", None) is not _NN_MODULE:
            raise NotNow("nn.Module registers parameters in another way, as under accelerate's init_empty_weights")
    reason = surroundings_reason()
    if reason is not None:
        raise NotNow(reason)


def _use_one_thread() -> None:
    """In this thread alone: waking others costs more than all that tensors so small need. torch sets all or none."""
    torch.get_num_threads()  # sets what is taken back here
    try:
        ctypes.CDLL(torch._C.__file__).omp_set_num_threads(1)
    except (OSError, AttributeError):  # a torch without OpenMP
        pass


def _in_thread(work: Callable[[], Verdict]) -> Verdict:
    results: list[Any] = []

    def run() -> None:
        _here.on = True
        try:
            results.append(work())
        except BaseException as problem:
            results.append(problem)

    thread = threading.Thread(target=run, name="bert_fast comparison", daemon=True)
    try:
        thread.start()
    except RuntimeError as problem:  # the interpreter is shutting down, or has no thread left
        raise NotNow(str(problem)) from None
    thread.join()
    (result,) = results
    if isinstance(result, BaseException):
        raise result
    return result


def _forget_lock() -> None:
    """In a process forked while another thread compared, nobody would give the lock back."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_lock)
if not is_tested():
    Family.compare = difference
