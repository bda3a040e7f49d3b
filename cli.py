"""The command line, without ComfyUI: `lowbit quantize IN OUT` and `lowbit inspect FILE`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import LowbitError, StorageError
from .ops.auto_format import choose_format
from .ops.checkpoint import open_checkpoint
from .ops.device_info import device_info
from .ops.formats import AS_STORED, AUTO, FORMAT_CHOICES, find_format
from .ops.keep_rules import parse_rules
from .ops.layer_errors import layer_errors
from .ops.plan import make_plan
from .ops.plan_report import plan_report, plan_summary
from .ops.stream import quantize_checkpoint, read_origin


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, or 2 after one sentence on standard error when the input is bad."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
    except LowbitError as error:
        print(f"lowbit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lowbit: interrupted, nothing was left behind.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lowbit", description="Quantize checkpoints and look into them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    quantize = commands.add_parser("quantize", help="write a quantized file that stock ComfyUI loads")
    quantize.add_argument("source", type=Path, metavar="IN", help="a .safetensors file, shard or index.json")
    quantize.add_argument("target", type=Path, metavar="OUT", help="the .safetensors file to write")
    quantize.add_argument("--format", default=AUTO, choices=FORMAT_CHOICES, help="weight format (default: auto)")
    quantize.add_argument(
        "--keep", default="auto", metavar="RULES", help="globs of layers that stay in 16 bits, comma-separated"
    )
    quantize.add_argument("--device", default=None, help="where to quantize (default: the GPU, where there is one)")
    quantize.add_argument("--dry-run", action="store_true", help="only list what would be done")
    quantize.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    quantize.set_defaults(command=_quantize)

    inspect = commands.add_parser("inspect", help="show formats and sizes per layer, and what was kept and why")
    inspect.add_argument("file", type=Path, metavar="FILE", help="a .safetensors file, shard or index.json")
    inspect.add_argument(
        "--against", type=Path, metavar="ORIGINAL", help="also show each layer's error against this original"
    )
    inspect.set_defaults(command=_inspect)
    return parser


def _quantize(options: argparse.Namespace) -> None:
    checkpoint = open_checkpoint(options.source)
    rules = parse_rules(options.keep)
    device = device_info(options.device)
    name, reason = options.format, "asked for"
    if name == AUTO:
        name, reason = choose_format(checkpoint, device, rules)
    plan = make_plan(checkpoint, None if name == AS_STORED else find_format(name), rules)
    if options.dry_run:
        print(plan_report(checkpoint, plan, device, f"{name}: {reason}"))
        return
    if options.target.exists() and not options.overwrite:
        raise StorageError(f"{options.target} exists: name another file or add --overwrite.")
    if options.target.resolve() in {file.resolve() for file in checkpoint.files}:
        raise StorageError(f"{options.target} is the source itself: name another file.")
    quantize_checkpoint(
        checkpoint,
        plan,
        options.target,
        device="cuda" if device.capability else "cpu",
        progress=_bar(),
    )
    print(f"\n{plan_summary(plan)}\nFormat {name}: {reason}\nWritten and verified: {options.target}")


def _inspect(options: argparse.Namespace) -> None:
    checkpoint = open_checkpoint(options.file)
    plan = make_plan(checkpoint, None, None)
    origin = read_origin(checkpoint.metadata)
    kept = origin.get("kept") if origin else None
    print(plan_report(checkpoint, plan, device_info(), "as stored"))
    if origin is not None:
        print(f"Made by Lowbit from {origin.get('source')} as {origin.get('format')}.")
    if isinstance(kept, dict) and kept:
        print("Kept in 16 bits:")
        for layer, why in kept.items():
            print(f"  {layer}: {why}")
    if options.against is not None:
        _print_errors(options.file, options.against)


def _print_errors(file: Path, original: Path) -> None:
    print(f"{'relative error':>14}  {'SQNR dB':>7}  {'format':<16} layer")
    for row in layer_errors(open_checkpoint(file), open_checkpoint(original)):
        print(f"{row.relative_error:14.2e}  {row.sqnr_decibels:7.1f}  {row.core_format:<16} {row.layer}")


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
