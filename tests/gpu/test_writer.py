"""Claims about files and tensors on a GPU: written and read they stay what they are, whatever their sizes and strides."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.staging import STAGED
from lowbit.ops.writer import CheckpointWriter, names_nbytes


def test_what_lies_on_the_gpu_is_written_while_the_next_is_made(tmp_path):
    rows = STAGED // 4096
    shapes = [(rows, 4096), (2 * rows + 1, 4097), (1,), (0, 8), (3, 5)]
    names = [f"layer {index}" for index in range(len(shapes))]
    expected = {}
    with CheckpointWriter(
        tmp_path / "a.safetensors", name_bytes=names_nbytes(names), name_count=len(names), metadata={}, behind=True
    ) as writer:
        for name, shape in zip(names, shapes, strict=True):
            tensor = torch.randint(-128, 128, shape[::-1], device="cuda", dtype=torch.int8).T
            expected[name] = tensor.cpu()
            writer.add(name, tensor)
            del tensor
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    for name, tensor in expected.items():
        read = checkpoint.read_stored(name, "cuda")
        assert read.is_cuda
        assert read.cpu().equal(tensor)
