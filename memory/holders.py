"""Who may hold memory that grows: what each holder has now, which of them grew, and which may be freed safely."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType, ModuleType
from typing import Any

import torch

BYTES, ENTRIES = "bytes", "entries"
REFERENCE = "a Python reference"
_WORTH_NAMING = 1 << 20
_CONTAINERS = (dict, list, tuple, set)
_MOST_HOLDERS = 6


@dataclass(frozen=True)
class Holder:
    """One row of the table.

    Attributes:
        name: for reports.
        unit: what `measure` counts, `BYTES` or `ENTRIES`.
        measure: what it holds now; 0 where it is not in use.
        free: gives it back; None where that would cost more than it gains or break what is in use.
        advice: what a user can do where it is not freed.
    """

    name: str
    unit: str
    measure: Callable[[], int]
    free: Callable[[], Any] | None = None
    advice: str = ""


@dataclass(frozen=True)
class Grown:
    """A holder that has more than it had."""

    name: str
    unit: str
    amount: int
    detail: str
    freed: bool
    advice: str

    @property
    def text(self) -> str:
        """For people."""
        size = f"{self.amount / 2**20:,.0f} MiB" if self.unit == BYTES else f"{self.amount:,} entries"
        end = "; freed" if self.freed else f"; {self.advice}" if self.advice else ""
        return f"{self.name}: {size} more{self.detail}{end}"


Memory = tuple[int, int]
"""Address and bytes of a tensor's storage."""


@dataclass(frozen=True)
class Snapshot:
    """What each holder had, and what lay in the memory of the tensors that Python could reach: shape and dtype of one."""

    amounts: Mapping[str, int]
    tensors: Mapping[Memory, str]


Weights = Callable[[], Iterable[torch.Tensor]]
"""Yields the tensors of models that are known to be loaded: they come and go with their models, and are no growth."""


def _no_weights() -> Iterable[torch.Tensor]:
    return ()


def take_snapshot(holders: Sequence[Holder], device_type: str, weights: Weights = _no_weights) -> Snapshot:
    """Measures every holder and walks all of Python's objects once: some tenths of a second."""
    tensors = tensors_by_memory(device_type, _addresses(weights()))
    kinds = {memory: _kind(tensor) for memory, tensor in tensors.items()}
    return Snapshot({holder.name: _safely(holder.measure) for holder in holders}, kinds)


def find_growth(
    holders: Sequence[Holder], before: Snapshot, device_type: str, weights: Weights = _no_weights
) -> list[Grown]:
    """Which holders have more than at `before`, the largest first; the safe ones are freed.

    Args:
        holders: rows of `HOLDERS`, and the caller's own.
        before: an earlier snapshot.
        device_type: of the tensors to look for: `cuda` or `cpu`.
        weights: of the models that are loaded now.
    """
    grown = []
    for holder in holders:
        amount = _safely(holder.measure) - before.amounts.get(holder.name, 0)
        if amount > (_WORTH_NAMING if holder.unit == BYTES else 0):
            freed = holder.free is not None and _freed(holder.free)
            grown.append(Grown(holder.name, holder.unit, amount, "", freed, holder.advice))
    now: Counter[str] = Counter()
    examples = {}
    for memory, tensor in tensors_by_memory(device_type, _addresses(weights())).items():
        # Which of the tensors that share it is met first is left to chance: it is called what it was called before.
        kind = before.tensors.get(memory) or _kind(tensor)
        now[kind] += memory[1]
        examples[kind] = tensor
    had: Counter[str] = Counter()
    for (_, nbytes), kind in before.tensors.items():
        had[kind] += nbytes
    for kind, amount in (now - had).most_common(3):
        if amount > _WORTH_NAMING:
            detail = f" in tensors of {kind}, held by {held_by(examples.pop(kind))}"
            grown.append(Grown(REFERENCE, BYTES, amount, detail, False, "what is named there keeps them"))
    return sorted(grown, key=lambda item: -item.amount if item.unit == BYTES else 0)


def _kind(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def tensors_by_memory(device_type: str, ignored: Collection[int]) -> dict[Memory, torch.Tensor]:
    """The memory of tensors that Python can reach on a kind of device, and one tensor that lies in each.

    ignored: addresses of memory that does not count.
    """
    fake = getattr(getattr(torch, "_subclasses", None), "FakeTensor", ())
    found: dict[Memory, torch.Tensor] = {}
    seen = set(ignored)
    for item in gc.get_objects():
        # Not isinstance: it would run the code of objects that pretend to be of another class.
        if not issubclass(type(item), torch.Tensor):
            continue
        try:
            if item.device.type != device_type or isinstance(item, fake):
                continue
            storage = item.untyped_storage()
            address = storage.data_ptr()
        except Exception:  # noqa: BLE001  # meta, functional and wrapper tensors have no storage to count
            continue
        if address in seen:
            continue
        seen.add(address)
        found[address, storage.nbytes()] = item
    return found


def _addresses(tensors: Iterable[torch.Tensor]) -> set[int]:
    found = set()
    for tensor in tensors:
        for part in stored_parts(tensor):
            try:
                found.add(part.untyped_storage().data_ptr())
            except Exception:  # noqa: BLE001  # as in `tensors_by_memory`
                continue
    return found


def stored_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What has a tensor's memory: itself, or the codes and scales of a quantized one, which has none of its own."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return [tensor] if flatten is None else [getattr(tensor, name) for name in flatten()[0]]


def held_by(item: Any) -> str:
    """Names what holds an object: the containers on the way to the first class or module that has a name."""
    trail: list[str] = []
    ignored = {id(item)}
    for _ in range(_MOST_HOLDERS):
        referrers = [other for other in gc.get_referrers(item) if id(other) not in ignored]
        named = [other for other in referrers if not isinstance(other, (FrameType, *_CONTAINERS)) or _is_module(other)]
        containers = [other for other in referrers if isinstance(other, _CONTAINERS)]
        ignored.add(id(referrers))
        if named:
            trail.append(_title(named[0]))
            break
        if not containers:
            break
        item = containers[0]
        ignored.add(id(item))
        trail.append(_title(item))
        del referrers, named, containers
    return " in ".join(trail) or "nothing that Python knows: a C++ object or a running function"


def _is_module(item: Any) -> bool:
    """A module, or its namespace."""
    return isinstance(item, ModuleType) or (isinstance(item, dict) and "__name__" in item and "__loader__" in item)


def _title(item: Any) -> str:
    if _is_module(item):
        return f"module {item.__name__ if isinstance(item, ModuleType) else item['__name__']}"
    kind = type(item)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _safely(measure: Callable[[], int]) -> int:
    """0 where a library changed under us: a report must not break a run."""
    try:
        return int(measure())
    except Exception:  # noqa: BLE001
        return 0


def _freed(free: Callable[[], Any]) -> bool:
    """Whether it worked; see `_safely`."""
    try:
        free()
    except Exception:  # noqa: BLE001
        return False
    return True


def _compiled_graphs() -> int:
    utils = sys.modules.get("torch._dynamo.utils")
    return 0 if utils is None else sum(utils.counters.get("stats", {}).values())


def _graph_pools() -> int:
    """Bytes in the private pools of CUDA graphs."""
    if not torch.cuda.is_initialized() or "torch._inductor.cudagraph_trees" not in sys.modules:
        return 0
    segments = torch.cuda.memory_snapshot()
    return sum(segment["total_size"] for segment in segments if tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0))


def _instances(module: str, name: str) -> list[Any]:
    """The objects of a class, where its module is imported."""
    kind = getattr(sys.modules.get(module), name, None)
    return [] if kind is None else [item for item in gc.get_objects() if type(item) is kind]


def _block_masks() -> int:
    masks = _instances("torch.nn.attention.flex_attention", "BlockMask")
    tensors = (value for mask in masks for value in vars(mask).values() if isinstance(value, torch.Tensor))
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _triton_kernels() -> int:
    functions = _instances("triton.runtime.jit", "JITFunction")
    caches = (entry for function in functions for entry in getattr(function, "device_caches", {}).values())
    return sum(len(entry[0] if isinstance(entry, tuple) else entry) for entry in caches)


def _kitchen_workspaces() -> dict[int, torch.Tensor]:
    module = sys.modules.get("comfy_kitchen.backends.cuda")
    return getattr(module, "_cublas_workspaces", {})


def _clear_kitchen() -> None:
    if _may_be_captured():
        raise RuntimeError("a captured CUDA graph may use comfy-kitchen's workspaces")
    _kitchen_workspaces().clear()


def _kitchen_nbytes() -> int:
    return sum(tensor.nbytes for tensor in _kitchen_workspaces().values())


def _may_be_captured() -> bool:
    """Whether there are CUDA graphs: a replay writes into the workspaces that the graph was captured with."""
    return any(issubclass(type(item), torch.cuda.CUDAGraph) for item in gc.get_objects())


def _clear_cublas() -> None:
    if torch.cuda.is_initialized() and not _may_be_captured():
        torch._C._cuda_clearCublasWorkspaces()


def _cublas_nbytes() -> int:
    """cuBLAS workspaces have no counter: what clearing them gives back is what they held; the next product makes new ones."""
    if not torch.cuda.is_initialized():
        return 0
    before = torch.cuda.memory_allocated()
    _clear_cublas()
    return before - torch.cuda.memory_allocated()


HOLDERS = (
    Holder(
        "torch._dynamo",
        ENTRIES,
        _compiled_graphs,
        advice="a model is compiled anew for each shape: compile it with dynamic=True or keep the shapes",
    ),
    Holder(
        "CUDA graph pools of torch.compile",
        BYTES,
        _graph_pools,
        advice="each shape keeps a pool of its own: compile without mode='reduce-overhead'",
    ),
    Holder("flex_attention block masks", BYTES, _block_masks, advice="a pack keeps one for each shape it saw"),
    Holder("cuBLAS workspaces", BYTES, _cublas_nbytes, _clear_cublas),
    Holder("Triton's compiled kernels", ENTRIES, _triton_kernels, advice="kernels are compiled anew for new shapes"),
    Holder("comfy-kitchen's workspaces", BYTES, _kitchen_nbytes, _clear_kitchen),
)
"""What is known to keep memory from one prompt to the next. What they do not explain is a Python reference."""
