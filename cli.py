"""The command line, without ComfyUI: `lowbit quantize IN OUT`, `lowbit inspect FILE` and `lowbit generate MODEL`."""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .errors import CapabilityError, CheckpointError, LowbitError, StorageError
from .ops.auto_format import FormatChooser
from .ops.checkpoint import Checkpoint, open_checkpoint
from .ops.device_info import device_info
from .ops.diffusion_names import converted_model
from .ops.foreign_layers import foreign_sentences
from .ops.formats import AS_STORED, AUTO, FORMAT_CHOICES, SMALLEST, find_format
from .ops.keep_rules import parse_rules
from .ops.layer_errors import layer_errors
from .ops.plan import make_plan
from .ops.plan_report import plan_report, plan_summary, unmatched_sentences
from .ops.sampled_errors import sampled_errors
from .ops.stream import quantize_checkpoint, read_origin
from .ops.trade import trade_table
from .text.architecture import guess_architecture
from .text.caches import FULL, HEAVY_HITTERS, CachePolicy
from .text.sampling import Sampling
from .text.writer import Stopwatch, Writer, encode, load_tokenizer

logger = logging.getLogger("lowbit")

_MOST_TOKENS = 1 << 20
_NUMBERS = {int: "whole number", float: "number"}
_NEVER_QUANTIZED = (
    (
        "a LoRA",
        r"[._](lora|lora_linear_layer)[._](up|down|A|B)(\.default)?(\.weight)?$|\.(hada_w|lokr_w|oft_blocks)|\.[ab][12]\.weight$",
    ),
    (
        "a ControlNet or a model patch",
        r"^(control_model|controlnet_\w+|control_(add_embedding|img_in|all_x_embedder|noise_refiner)|input_hint_block"
        r"|after_proj_list|lllite_\w+|feature_embedder|duration_head)\.",
    ),
    ("a CLIP vision model", r"^(visual_projection|vision_model\.(pre_layrnorm|head))\."),
    ("a style model", r"^redux_(up|down)\."),
    ("a VAE", r"^decoder\.(conv_in|mid_block|middle|up_blocks)\."),
)
"""What ComfyUI builds of plain layers, which would take codes for weights without a word, and a name that such files have."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, or 2 after one sentence on standard error when the input is bad."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file's name need not be text.
            stream.reconfigure(errors="backslashreplace")
    try:
        command(options)
        sys.stdout.flush()
    except LowbitError as error:
        print(f"lowbit: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader, say `head`, has seen enough; Python must not try to flush the rest on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except OSError as error:
        print(
            f"lowbit: {error.filename or 'a file'} cannot be used ({error.strerror or error}): check its path and its permissions.",
            file=sys.stderr,
        )
        return 2
    except (torch.OutOfMemoryError, MemoryError):
        print(
            "lowbit: this takes more memory than there is: choose a smaller format, or --device cpu.", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("lowbit: interrupted, nothing half-written was left behind.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lowbit", description="Quantize checkpoints, look into them, and write text with them."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    quantize = commands.add_parser("quantize", help="write a quantized file that stock ComfyUI loads")
    quantize.add_argument(
        "source", type=Path, metavar="IN", help="a .safetensors file, shard or index.json, or a .gguf"
    )
    quantize.add_argument("target", type=Path, metavar="OUT", help="the .safetensors file to write")
    _add_format(quantize, FORMAT_CHOICES, AUTO)
    quantize.add_argument(
        "--keep",
        default="auto",
        metavar="RULES",
        help="globs of layers that stay in 16 bits, comma-separated (default: auto, the model family's own)",
    )
    quantize.add_argument("--device", default=None, help="where to quantize (default: the GPU, where there is one)")
    quantize.add_argument("--dry-run", action="store_true", help="only list what would be done")
    quantize.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    quantize.set_defaults(command=_quantize)

    inspect = commands.add_parser("inspect", help="show formats and sizes per layer, and what was kept and why")
    inspect.add_argument("file", type=Path, metavar="FILE", help="a .safetensors file, shard or index.json, or a .gguf")
    inspect.add_argument(
        "--against", type=Path, metavar="ORIGINAL", help="also show each layer's error against this original"
    )
    inspect.set_defaults(command=_inspect)
    _add_generate(commands)
    return parser


def _add_generate(commands: argparse._SubParsersAction) -> None:
    generate = commands.add_parser("generate", help="write text with a language model or a text encoder")
    generate.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder or a text encoder file")
    generate.add_argument("--prompt", required=True, help="what to answer")
    formats = [name for name in FORMAT_CHOICES if name not in (AUTO, SMALLEST)]
    _add_format(generate, formats, AS_STORED)
    generate.add_argument("--kv-cache", default=FULL, choices=(FULL, HEAVY_HITTERS), help="tokens that are kept")
    for name, kind, lowest, highest, default, said in (
        ("window", int, 1, _MOST_TOKENS, 252, "newest tokens that heavy_hitters keeps"),
        ("heavy-hitters", int, 0, _MOST_TOKENS, 252, "older tokens that heavy_hitters keeps"),
        ("max-length", int, 1, _MOST_TOKENS, 256, "tokens at most"),
        ("temperature", float, 0, 100, 0.0, "0: always the likeliest token"),
        ("top-k", int, 0, _MOST_TOKENS, 0, "only the likeliest so many (0: all)"),
        ("top-p", float, 0, 1, 1.0, "only the likeliest that add up to this"),
        ("seed", int, 0, (1 << 64) - 1, 0, "of the draws"),
    ):
        read = partial(_number, kind, lowest, highest)
        generate.add_argument(f"--{name}", type=read, default=default, help=f"{said} (default: {default})")
    generate.add_argument("--tokenizer", type=Path, default=None, help="a Hugging Face folder, if MODEL is a file")
    generate.add_argument("--raw", action="store_true", help="no chat template")
    generate.add_argument("--device", default=None, help="where (default: the GPU, where there is one)")
    generate.set_defaults(command=_generate)


def _add_format(command: argparse.ArgumentParser, choices: Sequence[str], default: str) -> None:
    """The list of formats stands in the help once, not in the usage too, which every mistake prints."""
    said = f"weight format: {', '.join(choices)} (default: {default})"
    command.add_argument("--format", default=default, choices=choices, metavar="FORMAT", help=said)


def _number(kind: type, lowest: float, highest: float, text: str) -> Any:
    """An option's number.

    Raises:
        ArgumentTypeError: it is none, or out of its range.
    """
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not lowest <= value <= highest:
        raise argparse.ArgumentTypeError(f"'{text}' is no {_NUMBERS[kind]} from {lowest} to {highest}")
    return value


def _quantize(options: argparse.Namespace) -> None:
    checkpoint = open_checkpoint(options.source)
    rules = parse_rules(options.keep)
    device = _device(options.device)
    measure = partial(sampled_errors, device=device, folder=None)
    chooser = FormatChooser(checkpoint, device_info(device), rules, measure)
    chosen = chooser.choose(options.format)
    plan = chosen.plan
    if options.format != AS_STORED:
        _check_whole_model(checkpoint)
    if options.dry_run:
        print(plan_report(checkpoint, plan, chooser.device, str(chosen), trade_table(chooser)))
        return
    _check_target(options.target, checkpoint, options.overwrite)
    try:
        quantize_checkpoint(checkpoint, plan, options.target, device=device, progress=_bar())
    except torch.OutOfMemoryError:
        logger.warning("Too little free memory on %s to quantize there: it is done on the CPU.", device)
        quantize_checkpoint(checkpoint, plan, options.target, device="cpu", progress=_bar())
    further = (*foreign_sentences(checkpoint.entries.values()), *unmatched_sentences(plan))
    said = "\n".join((plan_summary(plan), *further))
    nothing = "" if plan.changes_weights else "Nothing was quantized.\n"
    print(f"\n{said}\nFormat {chosen}\n{nothing}Written and verified: {options.target}")


def _check_target(target: Path, checkpoint: Checkpoint, overwrite: bool) -> None:
    """Raises StorageError where a model cannot be written, or something else lies already."""
    if not os.path.lexists(target.parent):
        raise StorageError(f"The folder {target.parent} does not exist: make it, or name a file in another one.")
    if os.path.exists(target) and not os.path.isfile(target):
        raise StorageError(f"{target} is no file and cannot be written over: name a .safetensors file.")
    if target.suffix.lower() != ".safetensors":
        raise StorageError(
            f"{target} is no name that ends in .safetensors, so ComfyUI would not find or open it: name one that does."
        )
    if os.path.lexists(target) and not overwrite:
        raise StorageError(f"{target} exists: name another file or add --overwrite.")
    if os.path.realpath(target) in map(os.path.realpath, checkpoint.files):
        raise StorageError(f"{target} is the source itself: name another file.")


def _check_whole_model(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for what ComfyUI could not load once it is quantized."""
    for what, name in _NEVER_QUANTIZED:
        if any(re.search(name, entry) for entry in checkpoint.entries):
            raise CheckpointError(
                f"{checkpoint.path.name} is {what}, which ComfyUI does not read quantized: use it as it is, with the quantized model."
            )
    model = converted_model(checkpoint.entries)
    if model is not None:
        raise CheckpointError(
            f"{checkpoint.path.name} has diffusers' names of {model}, which ComfyUI renames and joins after loading: use "
            "the file in ComfyUI's own names, or load this one with Load Diffusion Model (Lowbit), which quantizes what "
            "ComfyUI makes of it."
        )


def _device(name: str | None) -> torch.device:
    """The device to quantize on: the named one, else the current GPU, else the CPU.

    Raises:
        CapabilityError: there is no such device here.
    """
    if name is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CapabilityError(f"There is no device '{name}': write cpu, cuda, or cuda:1 for a second GPU.") from None
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= count):
        raise CapabilityError(
            f"The device '{name}' cannot be used here, where torch finds {count} NVIDIA GPUs: write cpu, or leave it out."
        )
    return device


def _inspect(options: argparse.Namespace) -> None:
    checkpoint = open_checkpoint(options.file)
    plan = make_plan(checkpoint, None, None)
    origin = read_origin(checkpoint.metadata)
    kept = origin.get("kept") if origin else None
    print(plan_report(checkpoint, plan, device_info(), "as stored"))
    if origin is not None:
        source = f" from {origin['source']}" if "source" in origin else ""
        print(f"Made by Lowbit{source} as {origin.get('format')}.")
    if isinstance(kept, dict) and kept:
        print("Kept in 16 bits:")
        for layer, why in kept.items():
            print(f"  {layer}: {why}")
    if options.against is not None:
        _print_errors(options.file, options.against)


def _print_errors(file: Path, original: Path) -> None:
    for place, row in enumerate(layer_errors(open_checkpoint(file), open_checkpoint(original))):
        if not place:
            print(f"{'relative error':>14}  {'SQNR dB':>7}  {'format':<16} layer")
        print(f"{row.relative_error:14.2e}  {row.sqnr_decibels:7.1f}  {row.stored_as:<16} {row.layer}")


def _generate(options: argparse.Namespace) -> None:
    device = _device(options.device)
    if not options.model.exists():
        raise CheckpointError(f"{options.model} does not exist: check its name.")
    if options.tokenizer is None and not options.model.is_dir():
        # No tokenizer would help another model.
        guess_architecture(open_checkpoint(options.model))
        raise CheckpointError(
            f"{options.model.name} has no tokenizer in it: name a Hugging Face folder by --tokenizer."
        )
    weight_format = None if options.format == AS_STORED else find_format(options.format)
    writer = Writer.load(options.model, weight_format, device)
    tokenizer = load_tokenizer(options.tokenizer or options.model)
    sampling = Sampling(options.temperature > 0, options.temperature, options.top_k, options.top_p, seed=options.seed)
    policy = CachePolicy(options.kv_cache, options.window, options.heavy_hitters)
    watch = Stopwatch.start()
    prompt = encode(tokenizer, options.prompt, options.raw)
    tokens = writer.write(prompt, options.max_length, sampling, policy, seen=watch.seen)
    print(tokenizer.decode(tokens, skip_special_tokens=True))
    logger.info(
        "%d tokens after %d of the prompt: the first after %.2f s, then %.1f a second.",
        len(tokens),
        len(prompt),
        watch.first,
        watch.rate,
    )


def _bar() -> Callable[[int, int, str], None]:
    """A progress line on a terminal, one line a tenth elsewhere."""
    shown = -1

    def report(done: int, total: int, name: str) -> None:
        nonlocal shown
        percent = 100 * done // total
        if sys.stderr.isatty():
            print(f"\r{percent:3d}% {name[-60:]:<60}", end="", file=sys.stderr, flush=True)
        elif percent // 10 > shown:
            shown = percent // 10
            print(f"{percent:3d}%", file=sys.stderr, flush=True)

    return report


if __name__ == "__main__":
    sys.exit(main())
