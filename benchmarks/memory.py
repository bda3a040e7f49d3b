"""ComfyUI on a smaller machine, with and without the memory manager: does it finish, in what memory, how fast, does it grow.

    python -m benchmarks.memory --out benchmarks/results/memory.json [--only CASE ...] [--steps N] [--work FOLDER] [--seconds N]

Checkpoints have the real dimensions and random weights; they are written into --work and stay there for the next call.
Every row is written as soon as it is measured, and what fails or takes longer than --seconds is a row with its error, so that
a run that is cut short can be continued with --only. --tiny runs everything on a CPU with tiny checkpoints and no caps, to test the script: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import torch

from benchmarks.memory_rig import (
    GIB,
    SmallerMachine,
    Usage,
    Watch,
    same_file,
    vram_used,
    wait_for_memory,
    write_checkpoint,
)
from benchmarks.timing import environment
from demo import comfyui, graphs, tiny
from demo.server import GraphFailedError, GraphRejectedError, Server, ServerDiedError, prepare_base
from demo.tiny import infinitetalk, qwen_image, text_encoders, vae, wan

QWEN_IMAGE = qwen_image.QwenImageConfig(heads=24, layers=60, joint=3584)
QWEN25 = text_encoders.Qwen25Config(3584, 18944, 28, 4, 28, 1280, 3420, 32)
WAN_14B = wan.WanConfig(dim=5120, ffn=13824, heads=40, layers=40, text=4096)
WAN_TALK = wan.WanConfig(dim=5120, ffn=13824, heads=40, layers=40, text=4096, in_channels=36, image_embedding=True)
UMT5 = text_encoders.Umt5Config(4096, 10240, 64, 64, 24, 256384)
TALK = infinitetalk.InfiniteTalkConfig(dim=5120, intermediate=512, out=768)
SAMPLERS = ("sample", "sample_high")
FAILURES = (GraphFailedError, GraphRejectedError, ServerDiedError, TimeoutError, aiohttp.ClientError)
"""What a graph on too small a machine may end with, and its row says."""

MANAGER = {
    "policy": "auto",
    "step_clearing": "auto",
    "every_n_steps": 1,
    "vram_limit_gib": 0.0,
    "sequential_cfg": "auto",
}


@dataclass(frozen=True)
class Scale:
    """How large everything is: the real thing, or tiny for a test of the script. `seconds`: the most a graph may take."""

    tiny: bool
    steps: int | None
    prompts: int
    windows: int
    seconds: float = 540

    def pick(self, real: Any, small: Any) -> Any:
        """One of two sizes."""
        return small if self.tiny else real


@dataclass(frozen=True)
class Contender:
    """A way to run a graph: with core's loaders or the pack's, with or without the manager."""

    name: str
    weight_format: str | None = None
    managed: bool = False


STOCK = Contender("stock ComfyUI")
MANAGED = Contender("memory manager, bf16 files", managed=True)
QUANTIZED = Contender("memory manager, format auto", "auto", True)
CONTENDERS = (STOCK, MANAGED, QUANTIZED)


@dataclass(frozen=True)
class Case:
    """A graph under caps, in GiB. `host` None leaves main memory alone."""

    name: str
    write: Callable[[Path, Scale], None]
    graph: Callable[[Scale, Contender], graphs.Graph]
    vram: tuple[int, ...]
    host: int | None


@dataclass
class Row:
    """One case, one contender, one cap. Sizes in bytes, times in seconds; None where it did not get so far."""

    case: str
    contender: str
    dynamic_vram: bool
    vram_cap: int | None
    host_cap: int | None
    completed: bool
    error: str | None
    peak_vram: int | None
    peak_resident: int
    peak_anonymous: int
    load_seconds: float | None
    seconds_per_step: float | None
    total_seconds: float
    report: dict[str, Any] | None


# --- checkpoints and graphs


def write_qwen(models: Path, scale: Scale) -> None:
    """The 20 B transformer, the 7 B text encoder and the VAE."""
    write_checkpoint(
        models / "diffusion_models/qwen_image.safetensors",
        qwen_image.shapes(scale.pick(QWEN_IMAGE, tiny.QWEN_IMAGE)),
    )
    encoder = text_encoders.qwen25_shapes(scale.pick(QWEN25, tiny.QWEN25))
    if not scale.tiny:
        encoder["lm_head.weight"] = (text_encoders.QWEN_VOCABULARY, QWEN25.width)
    write_checkpoint(models / "text_encoders/qwen25_vl.safetensors", encoder)
    write_vae(models, scale)


def write_vae(models: Path, scale: Scale) -> None:
    """The VAE that Wan 2.1, Wan 2.2 14B and Qwen-Image share."""
    write_checkpoint(models / "vae/wan_vae.safetensors", vae.shapes(scale.pick(96, 4)))


def write_umt5(models: Path, scale: Scale) -> None:
    """Wan's text encoder."""
    write_checkpoint(
        models / "text_encoders/umt5.safetensors",
        text_encoders.umt5_shapes(scale.pick(UMT5, tiny.UMT5)),
        extra={"spiece_model": text_encoders.sentencepiece_model(tiny.UMT5.vocabulary)},
    )


def write_wan(models: Path, scale: Scale) -> None:
    """Wan 2.2 14B's two models, UMT5 and the VAE. Where the disk is too small the second model links to the first."""
    config = scale.pick(WAN_14B, tiny.WAN)
    high = models / "diffusion_models/wan_high.safetensors"
    write_checkpoint(high, wan.shapes(config), config.metadata())
    write_umt5(models, scale)
    write_vae(models, scale)
    same_file(high.with_name("wan_low.safetensors"), high)


def write_talk(models: Path, scale: Scale) -> None:
    """Wan 2.1 I2V 14B, the InfiniteTalk patch and the VAE."""
    config = scale.pick(WAN_TALK, infinitetalk.matching_wan(tiny.INFINITETALK))
    write_checkpoint(models / "diffusion_models/wan_talk.safetensors", wan.shapes(config), config.metadata())
    write_checkpoint(
        models / "model_patches/infinitetalk.safetensors", infinitetalk.shapes(scale.pick(TALK, tiny.INFINITETALK))
    )
    write_vae(models, scale)


def managed(graph: graphs.Graph, sources: tuple[str, ...], contender: Contender) -> graphs.Graph:
    """The graph with a manager behind each model, and a report at its end, if the contender has them."""
    if not contender.managed:
        return graph
    for source in sources:
        name = f"manager_{source}"
        for entry in graph.values():
            entry["inputs"] = {key: [name, 0] if link == [source, 0] else link for key, link in entry["inputs"].items()}
        graph[name] = graphs.node("LowbitMemoryManager", model=[source, 0], vae=["vae", 0], **MANAGER)
    decoder = graph["images"]["inputs"]
    decoder["vae"] = [f"manager_{sources[-1]}", 2]
    graph["report"] = graphs.node("LowbitMemoryReport", value=["images", 0])
    graph["json"] = graphs.node("PreviewAny", source=["report", 3])
    return graph


def finished(graph: graphs.Graph) -> graphs.Graph:
    """With an output that needs the images and shows nothing large."""
    return (
        graph
        | {"end": graphs.node("PreviewImage", images=["last", 0])}
        | {"last": graphs.node("ImageFromBatch", image=["images", 0], batch_index=0, length=1)}
    )


def qwen_graph(scale: Scale, contender: Contender) -> graphs.Graph:
    """Qwen-Image at 1328 x 1328, 20 steps."""
    graph = graphs.qwen_image(
        graphs.load_diffusion_model("qwen_image.safetensors", contender.weight_format),
        graphs.conditioning_from_text(
            graphs.load_text_encoder("qwen25_vl.safetensors", "qwen_image", contender.weight_format)
        ),
        size=scale.pick(1328, 64),
        steps=scale.steps or scale.pick(20, 3),
    )
    return finished(managed(graph | graphs.decode(), ("model",), contender))


def wan_graph(scale: Scale, contender: Contender) -> graphs.Graph:
    """Wan 2.2 14B at 832 x 480 x 81: the high-noise model takes the first half of the steps, the low-noise one the rest."""
    steps = scale.steps or scale.pick(20, 4)
    load, form = graphs.load_diffusion_model, contender.weight_format
    graph = graphs.wan_t2v(
        load("wan_low.safetensors", form),
        graphs.conditioning_from_text(graphs.load_text_encoder("umt5.safetensors", "wan", form)),
        size=64,
        frames=scale.pick(81, 5),
        steps=steps,
    )
    graph["latent"]["inputs"] |= scale.pick({"width": 832, "height": 480}, {})
    graph["model_high"] = load("wan_high.safetensors", form)
    shared = {key: value for key, value in graph["sample"]["inputs"].items() if key not in ("seed", "denoise", "model")}
    halves = {
        "sample_high": {
            "model": ["model_high", 0],
            "add_noise": "enable",
            "start_at_step": 0,
            "end_at_step": steps // 2,
        },
        "sample": {"model": ["model", 0], "add_noise": "disable", "start_at_step": steps // 2, "end_at_step": steps},
    }
    for name, half in halves.items():
        leftover = "enable" if name == "sample_high" else "disable"
        graph[name] = graphs.node(
            "KSamplerAdvanced", **(shared | half), noise_seed=1, return_with_leftover_noise=leftover
        )
    graph["sample"]["inputs"]["latent_image"] = ["sample_high", 0]
    return finished(managed(graph | graphs.decode(), ("model_high", "model"), contender))


def talk_graph(scale: Scale, contender: Contender) -> graphs.Graph:
    """InfiniteTalk: windows one after the other, each going on from the frames of the one before."""
    graph = graphs.infinitetalk(
        graphs.load_diffusion_model("wan_talk.safetensors", contender.weight_format),
        graphs.load_model_patch("infinitetalk.safetensors", contender.weight_format),
        graphs.conditioning_random(width=scale.pick(WAN_TALK.text, 256)),
        frames=scale.pick(81, 5),
        steps=scale.steps or scale.pick(4, 1),
    )
    graph["talk"]["inputs"] |= scale.pick({"width": 832, "height": 480}, {})
    graph["audio"]["inputs"]["frames"] = scale.pick(4000, 400)
    graph["images"] = graphs.node("VAEDecode", samples=["sample", 0], vae=["vae", 0])
    frames = ["images", 0]
    for index in range(1, scale.windows):
        talk = dict(graph["talk"]["inputs"]) | {"previous_frames": frames}
        sample = dict(graph["sample"]["inputs"])
        sample |= {
            "model": [f"talk_{index}", 0],
            "positive": [f"talk_{index}", 1],
            "negative": [f"talk_{index}", 2],
            "latent_image": [f"talk_{index}", 3],
        }
        graph[f"talk_{index}"] = graphs.node("WanInfiniteTalkToVideo", **talk)
        graph[f"sample_{index}"] = graphs.node("KSampler", **sample)
        graph[f"images_{index}"] = graphs.node("VAEDecode", samples=[f"sample_{index}", 0], vae=["vae", 0])
        graph[f"joined_{index}"] = graphs.node("ImageBatch", image1=frames, image2=[f"images_{index}", 0])
        frames = [f"joined_{index}", 0]
    graph = managed(graph, ("model",), contender)
    if "report" in graph:
        graph["report"]["inputs"]["value"] = frames
    out = finished(graph)
    out["last"]["inputs"]["image"] = frames
    return out


CASES = {
    case.name: case
    for case in (
        Case("qwen_image", write_qwen, qwen_graph, (32, 24, 16), 60),
        Case("wan_2_2", write_wan, wan_graph, (24, 16), None),
    )
}
LONG = {"50_generations": (write_qwen, qwen_graph), "infinitetalk": (write_talk, talk_graph)}
ALL = (*CASES, *LONG, "overhead")


# --- measuring


class Steps:
    """When each sampling step was done, from the server's own progress events."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.times: dict[str, list[float]] = {}

    def __call__(self, event: Mapping[str, Any]) -> None:
        data = event.get("data") or {}
        if event["type"] == "progress" and str(data.get("node", "")).startswith(SAMPLERS):
            self.times.setdefault(data["node"], []).append(time.monotonic())

    @property
    def seconds_per_step(self) -> float | None:
        """The middle of all gaps between two steps of one sampler."""
        gaps = [b - a for times in self.times.values() for a, b in zip(times, times[1:], strict=False)]
        return statistics.median(gaps) if gaps else None

    @property
    def load_seconds(self) -> float | None:
        """From the queue to the first step, that step itself taken out."""
        first = min((times[0] for times in self.times.values()), default=None)
        return None if first is None else first - self.started - (self.seconds_per_step or 0.0)


def run_server(base: Path, contender: Contender, dynamic: bool, scale: Scale) -> Server:
    """A fresh ComfyUI; stock has no pack in it."""
    return Server(
        base,
        comfyui.find(),
        cpu=scale.tiny,
        only_shims=contender == STOCK,
        dynamic_vram=dynamic,
        name=f"benchmark-{contender.name.split()[0]}",
    )


def reason(failure: BaseException) -> str:
    """A failure's kind and the line that says most: the last one of a log, the first one of anything else."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()] or [""]
    return f"{type(failure).__name__}: {lines[-1 if isinstance(failure, ServerDiedError) else 0]}"[:400]


def measure(case: Case, contender: Contender, dynamic: bool, cap: int | None, base: Path, scale: Scale) -> Row:
    """Runs one case once on a machine of that size."""
    vram = None if cap is None or scale.tiny else cap * GIB
    host = None if case.host is None or scale.tiny else case.host * GIB
    wait_for_memory(vram, host)
    steps, error, report, usage = Steps(), None, None, Usage()
    with SmallerMachine(vram, host), contextlib.ExitStack() as stack:
        baseline = vram_used()
        try:
            server = stack.enter_context(run_server(base, contender, dynamic, scale))
            watch = Watch(server.process.pid, baseline, usage)
            stack.callback(watch.close)
            steps.started = time.monotonic()
            result = server.run(case.graph(scale, contender), timeout=scale.seconds, on_event=steps)
            report = json.loads(result.outputs["json"]["text"][0]) if contender.managed else None
        except FAILURES as failure:
            error = reason(failure)
        total = time.monotonic() - steps.started
    if report is not None:
        report.pop("samples")
    return Row(
        case.name,
        contender.name,
        dynamic,
        vram,
        host,
        error is None,
        error,
        usage.vram,
        usage.resident,
        usage.anonymous,
        steps.load_seconds,
        steps.seconds_per_step,
        total,
        report,
    )


def measure_growth(name: str, base: Path, scale: Scale) -> dict[str, Any]:
    """Allocated and reserved bytes at the end of each sampling run, beside the third one, as far as time allows."""
    graph = LONG[name][1](scale, MANAGED)
    marks: list[dict[str, int]] = []
    notes: list[str] = []
    error = None
    deadline = time.monotonic() + scale.seconds
    try:
        with run_server(base, MANAGED, True, scale) as server:
            for seed in range(scale.prompts if name == "50_generations" else 1):
                graph["sample"]["inputs"]["seed"] = seed
                result = server.run(graph, timeout=max(1.0, deadline - time.monotonic()))
                report = json.loads(result.outputs["json"]["text"][0])
                notes += report["notes"]
                marks += [
                    {key: sample[key] for key in ("allocated", "reserved", "host_resident")}
                    for sample in report["samples"]
                    if sample["phase"] == "sampled"
                ]
    except FAILURES as failure:
        error = reason(failure)
    found = {
        "case": name,
        "runs": len(marks),
        "error": error,
        "growth_over_third": None,
        "marks": marks,
        "notes": notes,
    }
    if len(marks) > 3:
        third = marks[2]
        found["growth_over_third"] = {
            key: max(mark[key] / max(1, third[key]) - 1 for mark in marks[3:]) for key in third
        }
    return found


def measure_overhead(base: Path, scale: Scale) -> dict[str, Any]:
    """Seconds per step with the manager on `auto` and without it, in turns, with memory to spare."""
    names = {"no manager": Contender("plain"), "manager, auto": MANAGED}
    found: dict[str, list[float]] = {name: [] for name in names}
    error = None
    deadline = time.monotonic() + scale.seconds
    try:
        with run_server(base, MANAGED, True, scale) as server:
            for turn in range(1 + scale.pick(4, 2)):
                for name, contender in names.items():
                    graph = qwen_graph(scale, contender)
                    graph["sample"]["inputs"]["seed"] = turn
                    steps = Steps()
                    server.run(graph, timeout=max(1.0, deadline - time.monotonic()), on_event=steps)
                    if turn and steps.seconds_per_step is not None:  # the first turn loads and compiles
                        found[name].append(steps.seconds_per_step)
    except FAILURES as failure:
        error = reason(failure)
    best = {name: min(values) for name, values in found.items() if values}
    slower = best["manager, auto"] / best["no manager"] - 1 if len(best) == len(found) else None
    return {"case": "overhead", "error": error, "seconds_per_step": found, "slower_by": slower}


def versions() -> dict[str, str]:
    """Of what the results depend on beside the GPU and PyTorch."""
    return {
        "comfyui": comfyui.version(comfyui.find()),
        "comfy-aimdo": importlib.metadata.version("comfy-aimdo"),
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs the cases that were asked for and writes each row at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=ALL, default=list(ALL))
    parser.add_argument("--caps", nargs="*", type=int, help="only these GPU sizes, in GiB")
    parser.add_argument("--contenders", nargs="*", choices=[c.name for c in CONTENDERS])
    parser.add_argument("--no-dynamic-vram", action="store_true")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--prompts", type=int, help="of 50_generations")
    parser.add_argument("--windows", type=int, help="of infinitetalk")
    parser.add_argument(
        "--seconds", type=float, default=Scale.seconds, help="the most that one graph, or one growth run, may take"
    )
    parser.add_argument("--work", type=Path)
    parser.add_argument("--tiny", action="store_true", help="test the script on a CPU; the numbers mean nothing")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        print("This needs an NVIDIA GPU; --tiny tests the script without one.", file=sys.stderr)
        return 1
    scale = Scale(
        options.tiny,
        options.steps,
        options.prompts or (5 if options.tiny else 50),
        options.windows or (3 if options.tiny else 20),
        options.seconds,
    )
    base = prepare_base((options.work or Path(tempfile.mkdtemp(prefix="lowbit-memory-"))).resolve())
    results = (
        json.loads(options.out.read_text()) if options.out.exists() else {"rows": [], "growth": [], "overhead": []}
    )
    results["environment"] = environment() | versions() | {"tiny": options.tiny}
    models = base / "models"

    def keep(kind: str, entry: dict[str, Any]) -> None:
        results[kind].append(entry)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1))
        shown = {key: value for key, value in entry.items() if key not in ("report", "marks")}
        print(json.dumps(shown), flush=True)

    for name in options.only:
        if name in CASES:
            case = CASES[name]
            case.write(models, scale)
            caps: list[int | None] = (
                [None] if options.tiny else [cap for cap in case.vram if cap in (options.caps or case.vram)]
            )
            for cap in caps:
                for contender in CONTENDERS:
                    if not options.contenders or contender.name in options.contenders:
                        row = measure(case, contender, not options.no_dynamic_vram, cap, base, scale)
                        keep("rows", asdict(row))
        elif name in LONG:
            LONG[name][0](models, scale)
            keep("growth", measure_growth(name, base, scale))
        else:
            write_qwen(models, scale)
            keep("overhead", measure_overhead(base, scale))
    return 0


if __name__ == "__main__":
    sys.exit(main())
