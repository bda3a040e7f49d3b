"""Fetches a block's streamed weights while the block before it computes, by core's own queue for blocks.

With dynamic VRAM core fetches one layer ahead in models whose code does not ask for more, Wan and Qwen-Image among them.
A layer with many weights and little to compute, such as a modulation, is then waited for. comfy.model_prefetch fetches
whole blocks, from hooks in a model's code; here the same calls are made from outside.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import comfy.model_management
import torch

from ...versions import find, missing
from .core_names import FETCHING

BLOCKS: dict[type[torch.nn.Module], str] = {
    kind: blocks
    for name, blocks in (
        ("comfy.ldm.wan.model.WanModel", "blocks"),
        ("comfy.ldm.qwen_image.model.QwenImageTransformer2DModel", "transformer_blocks"),
    )
    if (kind := find(name)) is not None
}
"""Diffusion model -> its attribute with the blocks that run one after the other."""

prefetch = find("comfy.model_prefetch")

_DYNAMIC = "prefetch_dynamic_vbars"
"""What core puts into the transformer options of a model whose weights dynamic VRAM moves."""


class BlockFetcher:
    """A wrapper of a diffusion model's forward that fetches each block's weights ahead, while some of them stream.

    Fetching has streams and buffers of its own: what a patch's layers stream within a block goes through core's, and
    would overwrite the block's weights there. Two blocks' streamed weights lie on the GPU at a time: where there was no
    memory for that once, it stays off.

    Attributes:
        enabled: whether it fetches at all.
        fits: whether a limit leaves room for it in this run.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled and not missing(FETCHING)
        self.fits = True
        self._ran: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def __call__(self, executor: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """`executor`, with hooks on the model's blocks for as long as it runs."""
        if torch.compiler.is_compiling() or not (self.enabled and self.fits):
            return executor(x, *args, **kwargs)
        model = executor.class_obj  # type: ignore[attr-defined]
        blocks = blocks_of(model)
        queue = None
        # Weights that come off the disk hold this thread up, and a whole block of them holds the GPU up with it.
        cold = model not in self._ran
        self._ran.add(model)
        if stream(blocks) and not (cold and empty(blocks)):
            queue = prefetch.make_prefetch_queue(list(blocks), x.device, _options(args, kwargs))
        if queue is None:
            return executor(x, *args, **kwargs)
        hooks = [block.register_forward_pre_hook(partial(self._fetch, queue, x.device)) for block in blocks]
        try:
            out = executor(x, *args, **kwargs)
            del queue[1:-1]  # what was skipped
            self._pop(queue, x.device, None)
        finally:
            for hook in hooks:
                hook.remove()
        return out

    def _fetch(self, queue: list[Any], device: torch.device, block: torch.nn.Module, inputs: Any) -> None:
        """Before a block runs. One that runs out of its turn, or once more, streams layer by layer."""
        place = next((place for place, waiting in enumerate(queue) if place and waiting is block), None)
        if place is None or any("_prefetch" in vars(module) for module in block.modules()):
            return
        del queue[1:place]
        self._pop(queue, device, block)

    def _pop(self, queue: list[Any], device: torch.device, block: torch.nn.Module | None) -> None:
        with own_streams(device):
            prefetch.prefetch_queue_pop(queue, device, block)


@contextlib.contextmanager
def own_streams(device: torch.device) -> Iterator[None]:
    """Core's tables of streams hold ours for a while: one pair a device, for every manager of the process."""
    tables = comfy.model_management.STREAMS, comfy.model_management.stream_counters
    # Core's are made first: made later, they might be the ones that we have.
    comfy.model_management.get_offload_stream(device)
    theirs = [table.pop(device, None) for table in tables]
    ours = _OWN.get(device)
    if ours is None or _shared(ours[0], theirs[0]):
        ours = _made(device, theirs[0])
    for table, own in zip(tables, ours, strict=True):
        if own is not None:
            table[device] = own
    try:
        yield
    finally:
        _OWN[device] = tables[0].pop(device, None), tables[1].pop(device, None)
        for table, their in zip(tables, theirs, strict=True):
            if their is not None:
                table[device] = their


_OWN: dict[torch.device, tuple[Any, Any]] = {}
"""Device -> our streams, and which of them is next."""

_POOL = 32
"""PyTorch hands its streams out of pools of this many, round and round: two of them may be one and the same."""


def _made(device: torch.device, theirs: Any) -> tuple[Any, Any]:
    """Streams as core makes them, none of which is one of core's."""
    tables = comfy.model_management.STREAMS, comfy.model_management.stream_counters
    for _ in range(_POOL):
        comfy.model_management.get_offload_stream(device)
        ours = tables[0].pop(device, None), tables[1].pop(device, None)
        if not _shared(ours[0], theirs):
            break
    return ours


def _shared(ours: Any, theirs: Any) -> bool:
    handles = {_handle(stream) for stream in theirs or ()}
    return any(_handle(stream) in handles for stream in ours or ())


def _handle(stream: Any) -> Any:
    return getattr(stream, "cuda_stream", id(stream))


def blocks_of(model: torch.nn.Module | None) -> Sequence[torch.nn.Module]:
    """The blocks of a diffusion model that this knows, in the order they run; those that are compiled fetch for themselves."""
    name = next((name for kind, name in BLOCKS.items() if isinstance(model, kind)), None)
    blocks = () if name is None else tuple(getattr(model, name))
    return () if any(hasattr(block, "_orig_mod") for block in blocks) else blocks


def stream(blocks: Sequence[torch.nn.Module]) -> bool:
    """Whether dynamic VRAM has some of these blocks' model in main memory only."""
    pages = _pages(blocks)
    return pages is not None and int(pages.loaded_size()) < int(pages.offset)


def empty(blocks: Sequence[torch.nn.Module]) -> bool:
    """Whether none of their model is on the GPU yet."""
    pages = _pages(blocks)
    return pages is not None and not int(pages.loaded_size())


def _pages(blocks: Sequence[torch.nn.Module]) -> Any:
    paged = (vars(module).get("_v") for block in blocks for module in block.modules())
    return next((page[0] for page in paged if page is not None), None)


def _options(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The transformer options among a forward's arguments, where each model has them in another place."""
    given = (value for value in (*args, *kwargs.values()) if isinstance(value, dict) and _DYNAMIC in value)
    return next(given, {})
