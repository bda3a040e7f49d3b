"""One of the processes that `torchrun` starts: diffusers' Wan by all of them beside Wan by one; writes FOLDER/RANK.json."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import torch
import torch.distributed as distributed
from diffusers import WanTransformer3DModel
from torch.overrides import _get_current_function_mode_stack

folder = Path(sys.argv[1])
sys.path.append(str(Path(__file__).resolve().parents[2]))

from demo.progress import ProgressLine  # noqa: E402
from demo.quantized_modules import DEVICE, DTYPE, load  # noqa: E402
from lowbit.attention.divided_model import divide_tokens  # noqa: E402
from lowbit.ops.formats import AS_STORED  # noqa: E402
from testing.measure import relative_error  # noqa: E402
from testing.tiny.tensors import draw, write  # noqa: E402

HEADS, TEXT = 3, 64


def wan() -> torch.nn.Module:
    """Three heads, which two processes cannot share evenly, of a width that the formats take."""
    return WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=128, text_dim=TEXT, ffn_dim=512, num_layers=2
    )


def loaded(name: str) -> torch.nn.Module:
    """The same weights at every call and in every process, in a format."""
    torch.manual_seed(0)
    own = folder / str(distributed.get_rank())
    own.mkdir(exist_ok=True)
    shapes = {key: tuple(value.shape) for key, value in wan().state_dict().items()}
    source = write(own / "wan.safetensors", draw(shapes))
    return load(source, wan, name, own, ProgressLine(name))[1]


def inputs(frames: int, height: int, width: int, batch: int = 1, by_token: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(frames * height * width)
    tokens = frames * (height // 2) * (width // 2)
    shape = (batch, tokens) if by_token else (batch,)
    made = {
        "hidden_states": torch.randn(batch, 16, frames, height, width, generator=generator),
        "timestep": torch.rand(shape, generator=generator) * 1000,
        "encoder_hidden_states": torch.randn(batch, 7, TEXT, generator=generator),
    }
    return {name: tensor.to(DEVICE, DTYPE) for name, tensor in made.items()}


def failure(model: torch.nn.Module, named: dict[str, torch.Tensor]) -> list:
    """What a forward raises, and how many function modes it leaves open."""
    try:
        model(**named)
        raised = ""
    except Exception as error:  # noqa: BLE001
        raised = f"{type(error).__name__}: {error}"
    return [raised, len(_get_current_function_mode_stack())]


def results() -> dict:
    """Everything that the tests look at."""
    found: dict = {"errors": {}, "lengths": [], "said": []}
    record = logging.Handler()
    record.emit = lambda entry: found["said"].append(entry.getMessage())
    logging.getLogger("lowbit.attention").addHandler(record)
    for name in (AS_STORED, "int8_convrot_fast"):
        alone, divided = loaded(name), divide_tokens(loaded(name), speeds=[1.0, 1.5])
        divided.blocks[0].ffn.register_forward_pre_hook(lambda _, args: found["lengths"].append(args[0].shape[1]))
        for case, named in {
            "odd": inputs(3, 6, 10),
            "two at once": inputs(2, 4, 6, batch=2),
            "a timestep a token": inputs(3, 4, 6, by_token=True),
            "one token": inputs(1, 2, 2),
        }.items():
            expected = alone(**named, return_dict=False)[0]
            found["errors"][f"{name}, {case}"] = [
                relative_error(divided(**named, return_dict=False)[0], expected) for _ in range(2)
            ]

    alone, divided, named = loaded(AS_STORED), divide_tokens(loaded(AS_STORED)), inputs(3, 6, 10)
    divided.blocks[1] = torch.compile(divided.blocks[1], backend="eager")
    expected = alone(**named, return_dict=False)[0]
    found["errors"]["a compiled block"] = [relative_error(divided(**named, return_dict=False)[0], expected)]

    class Foreign:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    class Broken(Foreign):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            raise KeyError("mine")

    for kind in (Foreign, Broken):
        divided = divide_tokens(loaded(AS_STORED))
        divided.blocks[0].attn1.processor = kind()
        found[kind.__name__] = failure(divided, inputs(3, 6, 10))
    return found


def main() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
    with torch.inference_mode():
        found = results()
    (folder / f"{distributed.get_rank()}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


main()
