"""A VAE under the memory manager: decodes on the GPU within the budget, whole if that fits and tiled if not."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ...errors import MemoryBudgetError
from ...memory.components import GIB
from ...memory.decisions import VaeTiles, plan_tiles, smaller
from ...memory.policies import Settings
from ..in_front import class_in_front
from .pages import keep_streams_free
from .release import manage_prompt
from .room import alone_after_oom, raise_other, reachable_room, release_all_but, release_for
from .session import session

_SMALLEST_TILE = 256
"""Pixels; smaller tiles show their seams."""


class ManagedVAE:
    """Mixin over core's VAE: only where and in what pieces it decodes differs."""

    patcher: Any
    device: torch.device
    vae_dtype: torch.dtype
    _lowbit_memory: tuple[Settings, str | None]
    _decoding_whole = False

    def decode(self, samples_in: torch.Tensor, vae_options: dict[str, Any] | None = None) -> torch.Tensor:
        """Core's decode; latent in, (batch, [frames,] height, width, channels) out."""
        options = vae_options or {}
        if self.latent_dim == 2 and samples_in.ndim == 5:  # type: ignore[attr-defined]
            samples_in = samples_in[:, :, 0]
        self._begin("decode", self.memory_used_decode(samples_in.shape, self.vae_dtype))  # type: ignore[attr-defined]
        tiles = None if options else self._tiles(samples_in)
        if tiles is None:
            out = alone_after_oom(lambda: self._decode_whole(samples_in, options), self.patcher, "the decode")
        else:
            session().say(f"The VAE decodes in tiles of {self._size(tiles)}: the whole does not fit.")
            out = self._decode_in(tiles, samples_in)
        sample = session().observe("decoded")
        session().passed((type(self).__name__, tuple(samples_in.shape), "decoded"), sample)
        return out

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        """Core's encode, after a release if it needs the room."""
        self._begin("encode", self.memory_used_encode(self._pixel_shape(pixel_samples), self.vae_dtype))  # type: ignore[attr-defined]
        encode = super().encode  # type: ignore[misc]
        out = alone_after_oom(lambda: encode(pixel_samples), self.patcher, "the encode")
        session().observe("encoded")
        return out

    def decode_tiled_(self, samples: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Core's tiles of a picture; what it falls back to after running out of memory."""
        self._after_running_out()
        return super().decode_tiled_(samples, *args, **kwargs)  # type: ignore[misc]

    def decode_tiled_3d(self, samples: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As above, for video; a fallback never takes tiles as large as the whole that has just failed."""
        if self._after_running_out() and not args:
            whole = max(samples.shape[-2:])
            size = max(self._smallest_tile(), min(kwargs.get("tile_x", whole), -(-whole // 2)))
            kwargs |= {"tile_x": size, "tile_y": size, "overlap": (1, max(1, size // 4), max(1, size // 4))}
        return super().decode_tiled_3d(samples, *args, **kwargs)  # type: ignore[misc]

    def _decode_tiled_owned(self, samples: torch.Tensor, **kwargs: Any) -> Any:
        """As above, for a VAE that cuts its tiles itself."""
        self._after_running_out()
        return super()._decode_tiled_owned(samples, **kwargs)  # type: ignore[misc]

    def _decode_whole(self, samples: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        self._decoding_whole = True
        try:
            return super().decode(samples, options)  # type: ignore[misc]
        finally:
            self._decoding_whole = False

    def _after_running_out(self) -> bool:
        """Whether core has fallen back to tiles: then nothing else needs to be on the GPU, and the report says so."""
        if not self._decoding_whole:
            return False
        self._decoding_whole = False
        session().say("Out of memory in the decode: done again in tiles.")
        release_all_but([self.patcher], "the decode")
        return True

    def _begin(self, phase: str, working: float) -> None:
        settings, node_id = self._lowbit_memory
        manage_prompt(node_id, settings.limit_bytes)
        if self.device.type == "cpu" and session().device.torch_device.type != "cpu":
            session().say("The VAE works on the CPU, where --cpu-vae or a node has put it: that takes minutes.")
        keep_streams_free(self.patcher)
        release_for(settings.row.release_before_decode, self.patcher, working, what=f"the VAE to {phase}")
        session().observe(phase)

    def _pixel_shape(self, pixels: torch.Tensor) -> tuple[int, ...]:
        """What core makes of (frames or batch, height, width, channels): channels first, and frames as one video."""
        if pixels.ndim != 4:
            return tuple(pixels.movedim(-1, 1).shape)
        count, height, width, channels = pixels.shape
        if self.latent_dim != 3:  # type: ignore[attr-defined]
            return (count, channels, height, width)
        return (count, channels, 1, height, width) if self.not_video else (1, channels, count, height, width)  # type: ignore[attr-defined]

    def _tiles(self, samples: torch.Tensor) -> VaeTiles | None:
        """How to cut this latent; None when it fits whole, or is of a kind that core cuts by itself."""
        if samples.ndim not in (4, 5) or self.latent_dim < 2 or not session().device.holds_models:  # type: ignore[attr-defined]
            return None
        if self.device != session().device.torch_device or getattr(self, "extra_1d_channel", None) is not None:
            return None

        def estimate(size: int, length: int | None) -> float:
            shape = list(samples.shape[:2]) + ([length or samples.shape[2]] if samples.ndim == 5 else [])
            shape += [min(size, side) for side in samples.shape[-2:]]
            return float(self.memory_used_decode(tuple(shape), self.vae_dtype))  # type: ignore[attr-defined]

        room = reachable_room(self.patcher)
        height, width = samples.shape[-2:]
        return plan_tiles(estimate, height, width, self._frames(samples), self._smallest_tile(), room)

    def _frames(self, samples: torch.Tensor) -> int:
        return samples.shape[2] if samples.ndim == 5 and self.latent_dim == 3 else 1  # type: ignore[attr-defined]

    def _smallest_tile(self) -> int:
        return max(1, _SMALLEST_TILE // self.spacial_compression_decode())  # type: ignore[attr-defined]

    def _decode_in(self, tiles: VaeTiles, samples: torch.Tensor) -> torch.Tensor:
        """Decodes in tiles, in smaller ones after running out of memory, until they cannot be smaller."""
        current: VaeTiles | None = tiles
        while current is not None:
            try:
                return self._decode_tiles(current, samples)
            except Exception as error:  # noqa: BLE001
                raise_other(error)
            release_all_but([self.patcher], "the decode")
            current = smaller(current, self._smallest_tile(), self._frames(samples))
            if current is not None:
                session().say(f"Out of memory in the decode: done again in tiles of {self._size(current)}.")
        raise MemoryBudgetError(
            f"The VAE ran out of memory even in tiles of {_SMALLEST_TILE} pixels, with {session().limit.budget / GIB:.2f} "
            "GiB for it: close what else uses the GPU, raise vram_limit_gib, or load the VAE in bf16."
        )

    def _decode_tiles(self, tiles: VaeTiles, samples: torch.Tensor) -> torch.Tensor:
        time = {} if tiles.frames is None else {"tile_t": tiles.frames, "overlap_t": tiles.overlap_frames}
        return self.decode_tiled(  # type: ignore[attr-defined]
            samples, tile_x=tiles.size, tile_y=tiles.size, overlap=tiles.overlap, **time
        )

    def _size(self, tiles: VaeTiles) -> str:
        pixels = f"{tiles.size * self.spacial_compression_decode()} pixels"  # type: ignore[attr-defined]
        return pixels if tiles.frames is None else f"{pixels} and {tiles.frames} latent frames"


def manage_vae(vae: Any, settings: Settings, node_id: str | None) -> Any:
    """A managed VAE that shares the model and patcher of this one."""
    managed = copy.copy(vae)
    managed.__class__ = class_in_front(type(vae), ManagedVAE)
    managed._lowbit_memory = (settings, node_id)
    return managed
