"""Files of tiny models for the tests of this folder, and what the loader builds of one."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.formats import FORMATS
from lowbit.ops.plan import make_plan
from lowbit.ops.stream import quantize_checkpoint
from testing import tiny


def save(tensors, path, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata or tiny.WAN.metadata())
    return path


def load(host, weight_format: str, name: str = "wan_t2v.safetensors"):
    """A tiny model through the loader, quantized on the way."""
    planned = host.preparing.plan_diffusion_model(host.folder / name, host.preparing.Request(weight_format))
    return host.loading.load_diffusion_model(str(host.preparing.prepared_file(planned)))


def block(patcher) -> torch.nn.Module:
    return patcher.model.diffusion_model.blocks[0]


def built(host, path) -> torch.nn.Module:
    return host.loading.load_diffusion_model(str(path)).model.diffusion_model


def quantized_file(tmp_path, format_name, tensors=None):
    source, target = (
        save(tensors or tiny.wan_tensors(), tmp_path / "source.safetensors"),
        tmp_path / "stored.safetensors",
    )
    checkpoint = open_checkpoint(source)
    quantize_checkpoint(checkpoint, make_plan(checkpoint, FORMATS[format_name], None), target)
    return target
