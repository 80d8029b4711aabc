"""CUDA graphs of whole forwards, for inference whose cost is launching: one replay instead of some hundred launches.

A call of (B, S) is rounded up to a bucket (batch and length to powers of two). A bucket's graph works on buffers of its
own; inputs are copied in, outputs copied out, so what the user holds is never written again. The true (B, S) is an
int32 tensor on the device that `pack` reads: what lies outside is neither row nor key, so that rounding adds no rows.

All graphs of a device share one memory pool: they never run at the same time. A lock orders copy-in, replay and
copy-out of all threads, an event orders them on the GPU where they come from several streams. Graphs end with the
snapshot (snapshot.py) under which they were captured, when a weight has moved or a module is no longer plain; weights
changed in place are simply read. Everything that is CUDA's own is in cuda_graphs.py.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import compress
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

import torch

from bert_fast.cuda_graphs import CudaBackend
from bert_fast.encoder import Encoded, encode
from bert_fast.family import ModelView
from bert_fast.kernels.runtime import next_power_of_2
from bert_fast.one_launch import encode_in_one_launch, is_wanted, one_launch_reason
from bert_fast.packing import make_packing
from bert_fast.snapshot import Snapshot, snapshots

logger = logging.getLogger("bert_fast")

MAX_GRAPHS = 12  # a model; six batch sizes at two lengths, a server's usual mix
MAX_ROWS = 8192  # of a bucket; from there on the GPU is slower than the launching thread
MAX_OUTPUT_BYTES = 64 * 2**20  # of a bucket; copying them out would cost more than launching
MAX_DEVICE_BYTES = 2**30  # inputs and outputs of all graphs of a device; the rest of the pool is shared
DEPENDENT_ROWS = 128  # up to here kernels are so short that starting them is a good part of their time
MAX_FAILURES = 3  # captures of a bucket that fail until it launches directly for ever; memory may be short for a while
INPUT_DTYPES = (torch.int64, torch.bool, torch.int64, torch.int64)  # ids, mask, token types, positions
MIN_LENGTH = 32  # shorter sequences would only add buckets: rows outside the batch are not computed


class Backend(Protocol):
    """What graphs need from a device; cuda_graphs.CudaBackend, and a stand-in for it in the tests."""

    def guard(self) -> AbstractContextManager[Any]: ...  # makes the device the current one
    def unavailable(self) -> str | None: ...  # why nothing can be replayed right now
    def begin(self) -> Any: ...  # the current stream; what follows on it comes after the last `end`
    def end(self, stream: Any, graph: Any) -> None: ...
    def capture(self, run: Callable[[], Encoded], dependent: bool) -> tuple[Any, Encoded]: ...  # with static outputs
    def replay(self, graph: Any) -> None: ...
    def finished(self, graph: Any) -> bool: ...  # the device is done with it, without waiting
    def pool_bytes(self) -> int: ...


BACKENDS: dict[str, Callable[[torch.device], Backend]] = {"cuda": CudaBackend}


class Key(NamedTuple):
    """All that a captured forward depends on beside the snapshot. B, S: the bucket."""

    B: int
    S: int
    has_mask: bool
    has_types: bool
    has_positions: bool
    skip: bool
    hidden: bool
    attentions: bool
    first_tokens_only: bool
    precision: str  # of fp32 products, as torch allows them
    one_launch: bool  # where it can be taken

    @property
    def given(self) -> tuple[bool, ...]:
        """Which of the inputs there are: ids, mask, token types, positions."""
        return True, self.has_mask, self.has_types, self.has_positions


class Call(NamedTuple):
    """One checked call of a BertModel: true B and S, its tensors, and what it is to return."""

    B: int
    S: int
    input_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    token_type_ids: torch.Tensor | None
    position_ids: torch.Tensor | None
    inputs_embeds: torch.Tensor | None
    skip: bool
    hidden: bool
    attentions: bool
    first_tokens_only: bool


def _key(snapshot: Snapshot, call: Call) -> Key:
    mask, types, positions = call.attention_mask, call.token_type_ids, call.position_ids
    S = max(next_power_of_2(call.S), MIN_LENGTH)
    if positions is None:  # the default ones are read from a buffer of this length
        S = min(S, snapshot.max_length)
    B = next_power_of_2(call.B)
    precision = torch.backends.cuda.matmul.fp32_precision if snapshot.dtype == torch.float32 else ""
    return Key(
        B, S, mask is not None, types is not None, positions is not None, call.skip and mask is not None, call.hidden,
        call.attentions, call.first_tokens_only, precision, is_wanted(B * S, snapshot.device),
    )  # fmt: skip


def _output_bytes(view: ModelView, key: Key, itemsize: int) -> int:
    layers = len(view.layers)
    positions = 1 if key.first_tokens_only else key.S
    hidden = key.B * positions * view.hidden * (layers + 1 if key.hidden else 1)
    pooled = 0 if view.pooler is None else key.B * view.hidden
    attentions = layers * key.B * view.heads * key.S**2 if key.attentions else 0
    return itemsize * (hidden + pooled + attentions)


def _surroundings(call: Call, snapshot: Snapshot) -> str | None:
    """Why this call cannot be replayed, whatever its size."""
    if snapshot.device.type not in BACKENDS:
        return f"the model is on {snapshot.device.type}"
    if torch.is_grad_enabled():
        return "gradients are on"
    if snapshot.training:
        return "a module is in training mode"
    if torch.is_autocast_enabled(snapshot.device.type):
        return "autocast is on"
    if call.input_ids is None:
        return "inputs_embeds were given"
    if snapshot.view.relative_bias is not None:
        return "the scores have a relative bias"
    if call.attention_mask is not None and call.attention_mask.dim() == 4:
        return "attention_mask is 4-D"
    if os.environ.get("BERT_FAST_GRAPHS") == "0":
        return "BERT_FAST_GRAPHS=0"
    return None


def _too_large(snapshot: Snapshot, key: Key) -> str | None:
    if key.B * key.S > MAX_ROWS:
        return f"{key.B} x {key.S} rows, over {MAX_ROWS}, are not launch-bound"
    if _output_bytes(snapshot.view, key, snapshot.dtype.itemsize) > MAX_OUTPUT_BYTES:
        return f"outputs of {key.B} x {key.S} take over {MAX_OUTPUT_BYTES >> 20} MiB"
    return None


class _Entry:
    """One captured forward and its buffers. used: when last, in replays of the device; nbytes: inputs and outputs."""

    def __init__(self, inputs: tuple[torch.Tensor | None, ...], shape: torch.Tensor) -> None:
        self.inputs = [x for x in inputs if x is not None]
        self.shape = shape
        self.graph: Any = None
        self.static: Encoded | None = None
        self.used = self.nbytes = 0
        self.op_by_op: str | None = None  # why its layers are not one launch
        self._true = (0, 0)
        self._views: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])

    def copy_in(self, call: Call) -> None:
        B, S = call.B, call.S
        if (B, S) != self._true:
            self._true = (0, 0)  # whatever interrupts what follows
            self.shape[0].fill_(B)  # numbers travel inside the launch: no copy from the host to wait for
            self.shape[1].fill_(S)
            self._true, self._views = (B, S), ([x[:B, :S] for x in self.inputs], [])
        given = (call.input_ids, call.attention_mask, call.token_type_ids, call.position_ids)
        for view, x in zip(self._views[0], (x for x in given if x is not None), strict=True):
            view.copy_(x)

    def copy_out(self) -> Encoded:
        """New tensors of the true shape, which nobody else writes."""
        static, (B, S), views = self.static, self._true, self._views[1]
        assert static is not None
        others = static.hidden[:-1]
        if not views:
            views += [x[:B, :S] for x in (static.last, *others)]
            views += [x[:B, :, :S, :S] for x in static.attentions]
            views += [] if static.pooled is None else [static.pooled[:B]]
        last, *rest = [view.clone(memory_format=torch.contiguous_format) for view in views]
        pooled = None if static.pooled is None else rest.pop()
        hidden = [*rest[: len(others)], last] if static.hidden else []
        return Encoded(last, pooled, hidden, rest[len(others) :])


class _Device:
    """All graphs of one device. retired: graphs nobody wants any more, kept until the device is done with them."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.lock = threading.Lock()
        self.replays = 0
        self.owners: WeakSet[ModelGraphs] = WeakSet()
        self.retired: deque[_Entry] = deque()

    def sweep(self) -> None:
        """Under the lock: let go of what has finished."""
        while self.retired and self.backend.finished(self.retired[0].graph):
            self.retired.popleft()

    def make_room(self, nbytes: int) -> None:
        owners = [owner for owner in self.owners if owner.entries]
        while owners and sum(owner.nbytes for owner in owners) + nbytes > MAX_DEVICE_BYTES:
            min(owners, key=lambda owner: next(iter(owner.entries.values())).used).drop_oldest()
            owners = [owner for owner in owners if owner.entries]

    def replay(self, entry: _Entry, call: Call) -> Encoded:
        self.replays += 1
        entry.used = self.replays
        stream = self.backend.begin()
        try:
            entry.copy_in(call)
            self.backend.replay(entry.graph)
            return entry.copy_out()
        finally:
            self.backend.end(stream, entry.graph)


class ModelGraphs:
    """The graphs of one model under one snapshot, least recently used first; no reference to the model."""

    def __init__(self, device: _Device) -> None:
        self.device = device
        self.entries: OrderedDict[Key, _Entry] = OrderedDict()
        self.sightings: dict[Key, int] = {}  # calls until its capture
        self.put_off: dict[Key, int] = {}  # how often evicted, or not captured
        self.failures: dict[Key, int] = {}
        device.owners.add(self)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in list(self.entries.values()))  # doctor reads it without the lock

    def is_due(self, key: Key) -> bool:
        """True on the second sighting of a bucket; after evictions on the 4th, 8th..., so that capturing stays rare
        where more buckets are in use than there may be graphs."""
        seen = self.sightings[key] = self.sightings.get(key, 0) + 1
        return seen >= 2 << self.put_off.get(key, 0)

    def refused(self, key: Key) -> bool:
        return self.failures.get(key, 0) >= MAX_FAILURES

    def _put_off(self, key: Key) -> None:
        self.sightings[key] = 0
        self.put_off[key] = self.put_off.get(key, 0) + 1

    def failed(self, key: Key) -> None:
        self.failures[key] = self.failures.get(key, 0) + 1
        self._put_off(key)

    def drop_oldest(self) -> None:
        key, entry = self.entries.popitem(last=False)
        self.device.retired.append(entry)
        self._put_off(key)

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if is_finalizing():
            return
        device = self.device
        device.retired.extend(self.entries.values())
        # in a garbage collection this thread may hold the lock, or be in a capture, where asking is an error
        if device.backend.unavailable() is None and device.lock.acquire(blocking=False):
            try:
                device.sweep()
            finally:
                device.lock.release()


_devices: dict[torch.device, _Device] = {}
_devices_lock = threading.Lock()


def _device(device: torch.device) -> _Device:
    found = _devices.get(device)
    if found is None:
        with _devices_lock:
            found = _devices.setdefault(device, _Device(BACKENDS[device.type](device)))
    return found


def _capture(snapshot: Snapshot, key: Key, call: Call) -> _Entry | None:
    """A graph for `key`, or None where it could not be captured: that is said, and the call launches directly."""
    graphs, device = snapshot.graphs, snapshot.graphs.device
    nbytes = _output_bytes(snapshot.view, key, snapshot.dtype.itemsize)
    nbytes += sum(key.B * key.S * dtype.itemsize for dtype in compress(INPUT_DTYPES, key.given))
    device.make_room(nbytes)
    while len(graphs.entries) >= MAX_GRAPHS:
        graphs.drop_oldest()
    device.sweep()
    try:
        entry = _captured(snapshot, key, call)
    except Exception as error:
        graphs.failed(key)
        what = "which launches directly" if graphs.refused(key) else "which launches directly for now"
        # the text alone: a record with the exception would keep the whole model alive
        logger.warning("no CUDA graph for %d x %d, %s: %s", key.B, key.S, what, str(error))
        return None
    entry.nbytes = nbytes
    graphs.entries[key] = entry
    return entry


def _captured(snapshot: Snapshot, key: Key, call: Call) -> _Entry:
    graphs, where, view = snapshot.graphs, snapshot.device, snapshot.view
    first_try = key not in graphs.failures
    # ordinary tensors, so that no_grad and inference_mode may both write them
    with torch.inference_mode(False), torch.no_grad():
        buffers = tuple(
            torch.zeros(key.B, key.S, dtype=dtype, device=where) if needed else None
            for dtype, needed in zip(INPUT_DTYPES, key.given, strict=True)
        )
        ids, mask, types, positions = buffers
        shape = torch.zeros(2, dtype=torch.int32, device=where)
        entry, why_not = _Entry(buffers, shape), one_launch_reason(view, key.B, key.S, snapshot.dtype, where)
        entry.op_by_op = why_not if first_try else "a capture failed"
        form = encode if entry.op_by_op else encode_in_one_launch

        def run() -> Encoded:
            packing = make_packing(mask, key.B, key.S, where, key.skip, view.uniform_empty, shape)
            return form(view, packing, ids, types, positions, None, key.hidden, key.attentions, key.first_tokens_only)

        entry.copy_in(call)  # the warm-up runs on real input
        entry.graph, entry.static = graphs.device.backend.capture(run, first_try and key.B * key.S <= DEPENDENT_ROWS)
    return entry


def replayed(snapshot: Snapshot, call: Call) -> Encoded | None:
    """The call's result from a graph, captured now if it is time for it; None: launch it directly."""
    if _surroundings(call, snapshot) is not None:
        return None
    key = _key(snapshot, call)
    if key.B * key.S > MAX_ROWS:
        return None
    device = _device(snapshot.device)
    with device.backend.guard():
        if device.backend.unavailable() is not None:
            return None
        with device.lock:
            if device.retired:
                device.sweep()
            graphs = snapshot.graphs
            if graphs is None:
                graphs = snapshot.graphs = ModelGraphs(device)
            entry = graphs.entries.get(key)
            if entry is None:
                if graphs.refused(key) or _too_large(snapshot, key) or not graphs.is_due(key):
                    return None
                entry = _capture(snapshot, key, call)
                if entry is None:
                    return None
            graphs.entries.move_to_end(key)
            return device.replay(entry, call)


def plan(snapshot: Snapshot, call: Call) -> str:
    """What `replayed` would do with this call, in words."""
    reason = _surroundings(call, snapshot)
    if reason is None:
        key = _key(snapshot, call)
        reason = _too_large(snapshot, key)
    if reason is None:
        device = _device(snapshot.device)
        with device.backend.guard():
            reason = device.backend.unavailable()
    if reason is None:
        graphs, bucket = snapshot.graphs, f"{key.B} x {key.S}"
        if graphs is not None:
            if key in graphs.entries:
                why_not = graphs.entries[key].op_by_op
                layers = f", layers op by op: {why_not}" if why_not else ", layers in one launch"
                return f"replayed, bucket {bucket}{layers * key.one_launch}"
            if graphs.refused(key):
                reason = f"capturing bucket {bucket} failed"
        reason = reason or f"bucket {bucket} is captured when it has come more than once"
    return f"launched directly, {reason}"


def held() -> Iterator[tuple[str, int, int]]:
    """(model and device, number of graphs, bytes of their inputs and outputs) of every model that has graphs."""
    for model, snapshot in snapshots():
        if snapshot.graphs is not None and snapshot.graphs.entries:
            name, graphs = f"{type(model).__name__} on {snapshot.device}", snapshot.graphs
            yield name, len(graphs.entries), graphs.nbytes


def pools() -> Iterator[tuple[str, int]]:
    """(device, bytes of the pool that all its graphs share)."""
    for where, device in list(_devices.items()):
        yield str(where), device.backend.pool_bytes()
