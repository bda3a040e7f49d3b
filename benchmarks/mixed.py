"""Measures what formats mixed layer by layer do to the picture, beside one format of the same bytes, on the trained model.

python -m benchmarks.mixed [--out benchmarks/results/mixed.json] [--without-clips]
Runs ComfyUI (COMFYUI_PATH) for the clips, and diffusers' Wan for how much of a layer's error is the model's; on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.goals import Goal, Record, write
from benchmarks.quality import OTHERS, entry
from demo import shapes_in_comfyui, shapes_in_diffusers
from demo.bundled_prompt import BundledPrompt
from demo.clips import FOLDER, MODEL, SHOWN, TRANSFORMER, Quality, judge
from demo.report import Row
from demo.shapes import Scene
from lowbit.kernels.measured import Numbers
from lowbit.ops.auto_format import FormatChooser
from lowbit.ops.checkpoint import Checkpoint, open_checkpoint
from lowbit.ops.device_info import DeviceInfo
from lowbit.ops.formats import AS_STORED, FORMATS
from lowbit.ops.mixed_plan import TwoPlans
from lowbit.ops.plan import QuantizationPlan, make_plan
from lowbit.ops.quantize import quantize_to_tensor
from lowbit.ops.sampled_errors import sampled_errors
from lowbit.ops.stream import quantize_checkpoint
from testing import comfyui
from testing.core import start_core
from testing.measure import environment, relative_error

GAINS = {"fp4_scaled": 3.0, "int8_convrot_fast": 0.0}
"""Format -> dB that a mix of no more bytes shall be nearer to bf16's clips."""
GPUS = {"RTX 20 to H200": (9, 0), "RTX 50": (12, 0)}
"""What the formats that are mixed depend on."""
KINDS = {
    "queries and keys of self-attention": ("self_attn.q", "self_attn.k"),
    "queries and keys of cross-attention": ("cross_attn.q", "cross_attn.k"),
    "values and outputs of self-attention": ("self_attn.v", "self_attn.o"),
    "values and outputs of cross-attention": ("cross_attn.v", "cross_attn.o"),
    "feed-forward": ("ffn.0", "ffn.2"),
}
LARGE_MODELS = ("Wan 2.2 T2V 14B", "Qwen-Image", "Flux", "LTX-2")
TOO_LARGE = 1.55
"""How many times as large as the GPU's memory each of them is taken to be in 8 bits: `auto` mixes from 1.5 on."""
SEEN_AT = (0.95, 0.8, 0.5, 0.2)
"""Of the noise that is left, at which the model's error is measured."""


def plans_of(capability: tuple[int, int]) -> TwoPlans:
    """The trained model in the two formats of a GPU."""
    measure = partial(sampled_errors, device="cpu", folder=None)
    return FormatChooser(open_checkpoint(FOLDER / TRANSFORMER), DeviceInfo("", capability, 0), None, measure).two_plans


def write_files(folder: Path) -> dict[str, tuple[str, QuantizationPlan, float]]:
    """Files of each format and of the mixes beside it: the file's name, its plan and the error told, by a name for people."""
    checkpoint = open_checkpoint(FOLDER / TRANSFORMER)
    rulers, found = {gpu: plans_of(capability) for gpu, capability in GPUS.items()}, {}
    for name in GAINS:
        alone = make_plan(checkpoint, FORMATS[name], None)
        found[name] = alone, None
        for gpu, ruler in rulers.items():
            mixed = ruler.within(alone.nbytes_after)
            found[f"mix in {name}'s bytes, {gpu}"] = mixed, ruler.error(mixed)
    files = {}
    for number, (name, (plan, told)) in enumerate(found.items()):
        file = f"mixed-{number}.safetensors"
        quantize_checkpoint(checkpoint, plan, folder / file)
        files[name] = file, plan, told
    return files


def clips_of(prompt: BundledPrompt, file: str, scenes: Sequence[Scene]) -> tuple[list[torch.Tensor], Row]:
    """The clips of a transformer's file as it is."""
    started, stem = time.monotonic(), Path(file).stem
    clips = [
        prompt.run(AS_STORED, seed, f"{stem}/{seed}", text=scene.prompt(), file=file)[0]
        for seed, scene in enumerate(scenes)
    ]
    size = (prompt.server.base / "models" / "diffusion_models" / file).stat().st_size
    return clips, Row(MODEL, stem, size, size, first_seconds=time.monotonic() - started)


def qualities(scenes: Sequence[Scene]) -> Iterator[tuple[str, Quality, QuantizationPlan | None, float | None]]:
    """bf16's clips, and those of every file of `write_files`."""
    with shapes_in_comfyui.server_with_files(comfyui.find(), cpu=True) as prompt:
        files = write_files(prompt.server.base / "models" / "diffusion_models")
        reference, row = clips_of(prompt, TRANSFORMER, scenes)
        yield "bf16", judge(row, reference, (), scenes), None, None
        made: dict[tuple[str, ...], tuple[list[torch.Tensor], Row]] = {}
        for name, (file, plan, told) in files.items():
            formats = tuple(layer.weight_format for layer in plan.layers.values())
            if formats not in made:
                made[formats] = clips_of(prompt, file, scenes)
            clips, row = made[formats]
            yield name, judge(row, clips, reference, scenes), plan, told


def sensitivities() -> dict[str, dict[str, float]]:
    """How much of a layer's error in 4 bits is the model's, over the root of the layer's share of the weights, by kind."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    tensors = {name: tensor.float() for name, tensor in load_file(FOLDER / TRANSFORMER).items()}
    model, encode = shapes_in_diffusers.wan_transformer().eval(), shapes_in_diffusers.text_encoder()

    def output(changed: dict[str, torch.Tensor]) -> torch.Tensor:
        model.load_state_dict(convert_wan_transformer_to_diffusers({**tensors, **changed}))
        return torch.cat([model(**inputs, return_dict=False)[0] for inputs in seen])

    with torch.inference_mode():
        seen = [
            {
                "hidden_states": torch.randn(1, 16, 4, 8, 8, generator=torch.Generator().manual_seed(seed)),
                "timestep": torch.tensor([1000 * noise]),
                "encoder_hidden_states": encode(scene.prompt()),
            }
            for seed, scene in enumerate(SHOWN)
            for noise in SEEN_AT
        ]
        exact = output({})
        plan = make_plan(open_checkpoint(FOLDER / TRANSFORMER), FORMATS["int4_asym_fast"], None)
        total = sum(tensors[f"{name}.weight"].numel() for name in plan.layers)
        found: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for name in plan.layers:
            kind = next((kind for kind, endings in KINDS.items() if name.endswith(endings)), None)
            if kind is not None:
                weight = tensors[f"{name}.weight"]
                stored = quantize_to_tensor(weight, FORMATS["int4_asym_fast"]).dequantize()
                error = relative_error(output({f"{name}.weight": stored}), exact)
                share = weight.numel() / total
                found[kind].append(error / relative_error(stored, weight) / share**0.5)
    return {
        kind: {"least": min(values), "median": statistics.median(values), "most": max(values)}
        for kind, values in found.items()
    }


def large_models() -> list[Record]:
    """What mixing gives real sizes, each layer's weights Gaussian: the bytes, and the error as the dry run tells it."""
    from testing.planned import checkpoint_of
    from testing.tiny.architectures import ARCHITECTURES

    gaussian = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))

    def measure(checkpoint: Checkpoint, formats: Mapping[str, Collection[str]]) -> dict[str, Numbers]:
        every = {name for names in formats.values() for name in names}
        errors = {
            name: relative_error(quantize_to_tensor(gaussian, FORMATS[name]).dequantize(), gaussian) for name in every
        }
        return dict.fromkeys(formats, errors)

    rows = []
    for name in LARGE_MODELS:
        checkpoint, pinned = checkpoint_of(ARCHITECTURES[name].real_sized())
        plans = FormatChooser(checkpoint, DeviceInfo("", (9, 0), 0), None, measure, pinned).two_plans
        room = int(plans.eight_bits.nbytes_after / TOO_LARGE)
        found = {
            "8 bits": plans.eight_bits,
            "4 bits": plans.four_bits,
            "smallest": plans.within(plans.four_bits.nbytes_after),
            "auto": plans.within(max(room, plans.four_bits.nbytes_after)),
        }
        rows += [
            {"name": name, "what": what, "tensor_bytes": plan.nbytes_after, "error_told": plans.error(plan)}
            for what, plan in found.items()
        ]
    return rows


def goals(rows: dict[str, Record]) -> list[Record]:
    """For each format, dB that a mix of no more bytes is better, and that it is no larger."""
    entries = []
    for name, gain in GAINS.items():
        mixes = [row for title, row in rows.items() if title.startswith(f"mix in {name}'s bytes")]
        goal = Goal(f"mixed in the bytes of {name}: PSNR above its", gain, "dB")
        entries.append(goal.judged(row["psnr_mean_db"] - rows[name]["psnr_mean_db"] for row in mixes))
        size = Goal(f"mixed in the bytes of {name}: tensors' bytes beside its", 100, "%", at_most=True)
        entries.append(size.judged(100 * row["tensor_bytes"] / rows[name]["tensor_bytes"] for row in mixes))
    return entries


def main() -> None:
    """Measures and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mixed.json"))
    parser.add_argument("--without-clips", action="store_true", help="leave what the file has of the trained model")
    options = parser.parse_args()
    result = json.loads(options.out.read_text()) if options.without_clips else of_the_trained_model()
    start_core(["--cpu"])
    write(options.out, result | {"large_models": large_models()})


def of_the_trained_model() -> Record:
    """Its clips, and how much of a layer's error is the model's."""
    rows: dict[str, Record] = {}
    for name, quality, plan, told in qualities((*SHOWN, *OTHERS)):
        row: dict[str, Any] = entry(quality)
        rows[name] = row | {"tensor_bytes": plan.nbytes_after if plan else None, "error_told": told}
        print(name, quality.text, flush=True)
    facts = environment(f"ComfyUI {comfyui.version(comfyui.find())}")
    return {"environment": facts, "rows": rows, "sensitivities": sensitivities(), "goals": goals(rows)}


if __name__ == "__main__":
    main()
