"""Checkpoints written by the reference implementation, safetensors, for the tests of ops."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit.ops import stream


def wan_like(dim: int = 256, ffn: int = 512, blocks: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors under the names of a Wan model, bf16 but for float32 norms."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.02).bfloat16()

    tensors = {
        "patch_embedding.weight": torch.randn(dim, 16, 1, 2, 2, generator=generator).bfloat16(),
        "text_embedding.0.weight": matrix(dim, 64),
        "time_embedding.0.weight": matrix(dim, 256),
        "time_projection.1.weight": matrix(dim * 6, dim),
        "head.head.weight": matrix(64, dim),
    }
    for block in range(blocks):
        for name in ("self_attn.q", "self_attn.k", "cross_attn.q", "cross_attn.o"):
            tensors[f"blocks.{block}.{name}.weight"] = matrix(dim, dim)
            tensors[f"blocks.{block}.{name}.bias"] = torch.randn(dim, generator=generator).bfloat16()
        tensors[f"blocks.{block}.self_attn.norm_q.weight"] = torch.ones(dim)
        tensors[f"blocks.{block}.ffn.0.weight"] = matrix(ffn, dim)
        tensors[f"blocks.{block}.ffn.2.weight"] = matrix(dim, ffn)
        tensors[f"blocks.{block}.modulation"] = torch.randn(1, 6, dim, generator=generator).bfloat16()
    return tensors


@pytest.fixture
def wan_tensors() -> dict[str, torch.Tensor]:
    return wan_like()


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(tensors: dict[str, torch.Tensor], name: str = "model.safetensors", metadata=None) -> Path:
        save_file(tensors, tmp_path / name, metadata=metadata)
        return tmp_path / name

    return write


@pytest.fixture(params=[False, True], ids=["in turn", "overlapping"])
def overlaps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether the quantizer reads and writes beside its work, on the CPU too. No thread of its own is left afterwards."""
    monkeypatch.setattr(stream, "_overlaps", lambda device: request.param)
    yield request.param
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lowbit-")]
