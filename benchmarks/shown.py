"""What each table of results shows: its file, and a heading for what makes a cell of a row.

`benchmarks.tables` puts them into the pages.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cells import (
    Row,
    by_kernel,
    by_modulation_bits,
    gib,
    key_percent,
    near_wan,
    number,
    number_or_text,
    parts_left,
    peak_ram,
    rate,
    ratio,
    ratio_text,
    table,
    worst_error,
)

RESULTS = Path(__file__).resolve().parent / "results"


def plain_rows(record: dict[str, Any]) -> Iterable[Row]:
    """A file's rows; those that it has by name stand under their names."""
    rows = record["rows"]
    return rows if isinstance(rows, list) else ({"name": f"`{name}`"} | row for name, row in rows.items())


@dataclass(frozen=True)
class Shown:
    """How the rows of one results file are shown.

    Attributes:
        file: in benchmarks/results.
        columns: heading -> a key of a row, or what makes a cell of it.
        note: a sentence above the table.
        rows: the file's content to rows.
        goals: whether the file's goals stand above it too.
    """

    file: str
    columns: dict[str, str | Callable[[Row], str]]
    note: str
    rows: Callable[[dict[str, Any]], Iterable[Row]] = plain_rows
    goals: bool = True

    @property
    def record(self) -> dict[str, Any] | None:
        """The file, or None where no script has written it yet."""
        path = RESULTS / self.file
        return json.loads(path.read_text()) if path.exists() else None

    def text(self) -> str:
        """Where it was measured, the goals, and the rows, without columns that are empty."""
        record = self.record
        if record is None:
            return f"Not measured yet: no `{self.file}`."
        parts = [f"{where(record)} (`benchmarks/results/{self.file}`). {self.note}".rstrip()]
        if self.goals and record.get("goals"):
            parts.append(goals(record))
        cells = [
            [cell(row) if callable(cell) else number_or_text(row.get(cell)) for cell in self.columns.values()]
            for row in self.rows(record)
        ]
        filled = [any(column) for column in zip(*cells, strict=True)]
        head, *body = ([*itertools.compress(line, filled)] for line in ([*self.columns], *cells))
        return "\n\n".join([*parts, table(head, body)])


def where(record: dict[str, Any]) -> str:
    """The device, the versions and the day."""
    facts = {**record, **record.get("versions", {}), **record.get("environment", {})}
    device = facts.get("gpu") or facts.get("device") or "A CPU"
    names = ("torch", "triton", "comfyui", "comfy-kitchen", "comfy_kitchen")
    versions = [f"{name.replace('_', '-')} {facts[name]}" for name in names if facts.get(name)]
    return ", ".join([device, *versions, str(facts.get("date", ""))[:10]]).rstrip(", ")


def goals(record: dict[str, Any]) -> str:
    """What was aimed at and what was measured; in bold what was missed."""
    rows = [
        (
            goal["name"],
            f"{'at most' if goal.get('at_most') else 'at least'} {number(goal['target'])} {goal['unit']}",
            ("{}" if goal["met"] else "**{}**").format(
                number(goal["measured"])
                if isinstance(goal["measured"], int | float)
                else goal["measured"] or "not measured"
            ),
        )
        for goal in record["goals"]
    ]
    return table(("goal", "aimed at", "measured, the worst (bold: missed)"), rows)


def beside(prefixes: dict[str, str]) -> Callable[[dict[str, Any]], Iterable[Row]]:
    """Of linear.json: our rows, joined with the same products of others, each under its prefix, and with those of bf16."""

    def rows(record: dict[str, Any]) -> Iterable[Row]:
        found = {(row["case"], row["m"], row["format"], row["contender"]): row for row in record["results"]}
        for (case, m, weight_format, contender), row in found.items():
            if contender == "lowbit":
                others = {prefix: (weight_format, name) for name, prefix in prefixes.items()}
                joined = dict(row)
                for prefix, key in (others | {"bf16_": ("bf16", "F.linear")}).items():
                    other = found.get((case, m, *key), {})
                    joined |= {f"{prefix}{name}": value for name, value in other.items()}
                yield joined

    return rows


def by_stage(record: dict[str, Any]) -> Iterable[Row]:
    """Of launch.json: each call beside the same one before, its stages spread out."""
    before = {(row["format"], row["dynamic"], row["rows"]): row["call"] for row in record.get("before", [])}
    for row in record["rows"]:
        key = row["format"], row["dynamic"], row["rows"]
        yield row | row["stages"] | {"before": before.get(key)}


def by_backend(record: dict[str, Any]) -> Iterable[Row]:
    """Of attention.json: a row a shape and backend that ran."""
    for shape in record["shapes"]:
        for name, entry in shape["backends"].items():
            if "ms" in entry:
                yield shape | entry | {"backend": name}


FORMAT_ERRORS = {
    "format": "name",
    "bits": "bits_per_weight",
    "weights off by": key_percent("weight_error"),
    "products off by": key_percent("product_error"),
    "with outliers": key_percent("product_error_with_outliers"),
}
LINEAR = {
    "case": lambda row: f"{row['case']} {row['m']:,} x {row['k']:,} x {row['n']:,}",
    "format": "format",
    "us": "us",
    "": rate,
    "comfy-kitchen, us": "kitchen_us",
    "bf16, us": "bf16_us",
    "times bf16": ratio("bf16_us", "us"),
    "more memory at the peak, MiB": "extra_peak_mib",
    "error": key_percent("relative_error"),
}
CLIPS = {
    "format": "name",
    "PSNR, dB": "psnr_mean_db",
    "worst clip": "psnr_worst_db",
    "shows what was asked": lambda row: f"{row['as_asked']} of {row['clips']}",
}
STEPS_NOTE = "Whole steps of real ComfyUI at real dimensions with fewer blocks and random weights, CFG on."
HEADLINE = (
    "stock, bf16",
    "stock, our FP8 file",
    "auto, attention exact",
    "auto, attention fast",
    "FP8, attention fast",
)
"""The contenders of steps.json that say what a user gains."""
STAGES = ("module", "weight", "choose and prepare", "launches", "bias", "LoRA")
"""Of launch.json."""
SHOWN: dict[str, Shown] = {
    "headline": Shown(
        "steps.json",
        {
            "model": "model",
            "": "contender",
            "s/step": "seconds",
            "times stock bf16": ratio_text("speedup"),
            "error against bf16": key_percent("error"),
        },
        STEPS_NOTE,
        goals=False,
        rows=lambda record: [row for row in record["rows"] if row["contender"] in HEADLINE],
    ),
    "steps": Shown(
        "steps.json",
        {
            "model": "model",
            "contender": "contender",
            "s/step": "seconds",
            "times stock bf16": ratio_text("speedup"),
            "times stock FP8": ratio_text("speedup_over_fp8"),
            "error against bf16": key_percent("error"),
        },
        STEPS_NOTE,
    ),
    "kernels": Shown(
        "steps.json",
        {
            "model": "model",
            "contender": "contender",
            "ms of the GPU a step": "all",
            "attention": "attention",
            "products": "products",
            "quantizing": "quantizing",
            "norms, rope, elementwise, copies": "rest",
        },
        "Of the runs above, by the profiler; of each the twelve longest kernels are told apart.",
        goals=False,
        rows=by_kernel,
    ),
    "elementwise": Shown(
        "elementwise.json",
        {
            "model": "case",
            "operation": "operation",
            "us": "us",
            "ComfyUI's, us": "comfyui_us",
            "a copy, us": "copy_us",
            "TB/s": "terabytes_per_second",
            "error": key_percent("error"),
        },
        "Activations of a block, prompts in one batch; read from memory, not from the cache.",
    ),
    "several_gpus": Shown(
        "several_gpus.json",
        {
            "model": "model",
            "weights, split": "way",
            "GPUs": "gpus",
            "s/step": "seconds",
            "times one GPU": ratio_text("speedup"),
            "error against one GPU": key_percent("error"),
            "workers' start, s (the very first)": lambda row: (
                f"{row['start_seconds']:.1f} ({row['first_start_seconds']:.1f})" if "first_start_seconds" in row else ""
            ),
        },
        "Whole steps of real ComfyUI as above, attention exact.",
    ),
    "compile": Shown(
        "compile.json",
        {
            "model": "model",
            "contender": "contender",
            "s/step": "seconds",
            "first step, s": "first_step",
            "times stock bf16": ratio_text("speedup"),
            "graphs": "graphs",
            "graph breaks": lambda row: str(sum(row["graph_breaks"].values())) if "graph_breaks" in row else "",
            "peak, GiB": "peak_gib",
        },
        STEPS_NOTE,
    ),
    "launch": Shown(
        "launch.json",
        {
            "format": "format",
            "dynamic VRAM": lambda row: "yes" if row["dynamic"] else "no",
            "rows": "rows",
            "us": "call",
            "bf16, us": "bf16",
            "before": "before",
            **{f"{name}, us": name for name in STAGES},
        },
        "Microseconds of the processor from the module's call to its return, 3,072 to 3,072, the GPU not waited for.",
        rows=by_stage,
    ),
    "load_check": Shown(
        "load_check.json",
        {
            "file": "kind",
            "GB": "gigabytes",
            "load, s": "load_seconds",
            "with the look": "load_seconds_with_the_check",
            "run, s": "run_seconds",
            "run with the look": "run_seconds_with_the_check",
            "longer by, % of the load": "share_of_load",
        },
        "Eight blocks of Wan 14B at 832x480, 33 frames, from the page cache, dynamic VRAM on: a load to the end of the first step, a run "
        "to that of the fourth. Medians, in the last column that of what a run took longer than the one beside it.",
    ),
    "formats": Shown("formats.json", FORMAT_ERRORS, "Relative, on Gaussian weights."),
    "lora": Shown(
        "lora.json",
        {
            "format": "name",
            "merged, then quantized": key_percent("merged"),
            "here": key_percent("here"),
            "decoded, patched and quantized again (stock ComfyUI)": key_percent("stock"),
        },
        "A small Wan with random weights and a LoRA of rank 16 that changes the latent by a fifth: the error of the latent.",
    ),
    "quality": Shown(
        "quality.json",
        CLIPS | {"transformer, MiB": lambda row: f"{row['transformer_bytes'] / 2**20:.1f}"},
        "On a CPU, where the `_fast` FP8 and FP4 formats do not quantize activations: their rows are those of the weights.",
    ),
    "mixed": Shown(
        "mixed.json",
        CLIPS | {"tensors, bytes": "tensor_bytes", "error as the dry run tells it": key_percent("error_told")},
        "The trained model again; a row of one format, and of mixes of no more bytes.",
    ),
    "mixed_large": Shown(
        "mixed.json",
        {
            "model": "name",
            "": "what",
            "weights": lambda row: gib(row["tensor_bytes"]),
            "error as the dry run tells it": key_percent("error_told"),
        },
        "Real sizes, Gaussian weights, an RTX 20 to H200, on which 8 bits are 1.55 times the memory there is.",
        goals=False,
        rows=lambda record: record["large_models"],
    ),
    "quantize": Shown(
        "quantize-h200.json",
        {
            "": "name",
            "MB/s of source": "source_mb_per_second",
            "peak RAM over idle, MiB": "peak_mib",
            "file, MiB": "target_mib",
        },
        "A bf16 file of 3.9 GiB, largest tensor 72 MiB.",
    ),
    "linear": Shown(
        "linear.json",
        LINEAR,
        "Large products are timed after 50 ms of the same one, at the clocks that the power limit leaves.",
        rows=beside({"comfy-kitchen": "kitchen_"}),
    ),
    "peers": Shown(
        "linear_peers.json",
        LINEAR | {"torchao, us": "torchao_us", "gemlite, us": "gemlite_us"},
        "An earlier run, beside other libraries.",
        rows=beside({"comfy-kitchen": "kitchen_", "torchao": "torchao_", "gemlite": "gemlite_"}),
    ),
    "attention": Shown(
        "attention.json",
        {
            "shape": "name",
            "backend": "backend",
            "ms": "ms",
            "TFLOP/s": "tflops",
            "times ComfyUI's": ratio("core_ms", "ms"),
            "error, plain / outliers": worst_error,
        },
        "Quantizing counted in.",
        rows=by_backend,
    ),
    "memory": Shown(
        "memory.json",
        {
            "case": "case",
            "VRAM": lambda row: gib(row["vram_cap"]) or "all",
            "contender": "contender",
            "": lambda row: "completed" if row["completed"] else f"**failed**: {row['error'][:100]}",
            "peak VRAM": lambda row: gib(row["usage"]["vram"]),
            "peak RAM": peak_ram,
            "s/step": "seconds_per_step",
            "fastest": lambda row: number(min(row["step_seconds"])) if row.get("step_seconds") else "",
            "load, s": "load_seconds",
            "total, s": "total_seconds",
        },
        "Real dimensions, random weights; the card is filled up to the VRAM given, main memory is capped at 60 GiB "
        "(Qwen-Image) and 64 GiB (Wan). Rows without a fastest step did not wait for the GPU at each step: only their "
        "totals count. Each row is one run beside others on a machine whose processor was shared.",
    ),
    "gguf": Shown(
        "gguf.json",
        {
            "block format": "kind",
            "rows": "rows",
            "stored anew, ms": "ms",
            "decoded at every call, ms": "peer_ms",
            "error": key_percent("error"),
            "error of decoding at every call": key_percent("peer_error"),
        },
        "One layer of 13,824 x 5,120 as int8_convrot_fast, beside ComfyUI-GGUF's decoder and a 16-bit product (an earlier "
        "run). The copy is not sent to the disk; what is converted is, and read back.",
    ),
    "families": Shown(
        "families.json",
        {
            "architecture": "name",
            **{name: near_wan(name) for name in ("int8_convrot_fast", "fp8_e4m3fn_scaled", "fp4_scaled")},
            "left by the rules": parts_left,
            "modulation": key_percent("modulation_share"),
            "fp8 with it in 8 / 16 bits": by_modulation_bits("fp8_e4m3fn_scaled"),
            "fp4 with it in 4 / 8 / 16 bits": by_modulation_bits("fp4_scaled"),
            "all in 16 bits": lambda row: gib(row["model_bytes"]),
            "kept in 16 bits": lambda row: gib(row["kept_bytes"]),
            "of all": key_percent("kept_share"),
            "as fp4": lambda row: gib(row["fp4_bytes"]),
            "of it in 8 bits": lambda row: gib(row["fp4_bytes_in_8_bits"]),
        },
        "Errors of one forward of tiny models of ComfyUI's own classes with random weights, on a CPU, where the FP8 and "
        "FP4 formats do not quantize activations; in bold what is more than twice that of Wan's middle one. How large an error is there "
        "goes by how much the random weights of an architecture make of any; what does not is the part that the keep rules leave "
        "(int8 / fp8 / fp4) of the error without them. Bytes at the "
        "published size, modulation is that of the blocks; what is kept is that of the 8-bit formats.",
        rows=lambda record: [row | {"near": record["near"]} for row in record["rows"]],
    ),
    "textgen": Shown(
        "textgen.json",
        {
            "model": "model",
            "weights": "weights",
            "decoder": "contender",
            "tokens/s": "tokens_per_second",
            "first token, s": "first_token_seconds",
            "prompt": "prompt_tokens",
        },
        "In ComfyUI, drawn weights, greedy. Peak: what PyTorch held; weights in dynamic VRAM lie outside it.",
    ),
    "text_quality": Shown(
        "text_quality.json",
        {"model": "model", "weights": "weights", "what is seen": "contender", "perplexity": "perplexity"},
        "On the first 1,000 tokens of Python's help topics (pydoc_data.topics); the cache counts from the 100th on.",
    ),
}
"""A marker's name -> what stands there."""
