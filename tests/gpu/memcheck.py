"""compute-sanitizer's memcheck over GPU tests of the linears and of attention: python tests/gpu/memcheck.py"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FORMATS = ("fp8_e4m3fn", "fp8_e5m2", "int8", "int8_convrot", "mxfp8", "nvfp4", "int4_convrot", "int4_asym")
TESTS = Path(__file__).with_name("test_linear.py")
ATTENTION = Path(__file__).parents[1] / "kernels" / "test_attention_int8.py"


def linears(name: str) -> subprocess.Popen[str]:
    """One format's tests of strides, alignment and strange values."""
    return start(
        TESTS,
        f"(test_any_stride and 5-{name}) or (test_misaligned_weight and 1-{name}) or (test_strange_rows and {name})",
    )


def start(tests: Path, chosen: str) -> subprocess.Popen[str]:
    """The sanitizer over chosen tests, every tensor its own allocation."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests), "-k", chosen]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *pytest]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def main() -> int:
    """0 when no run found an error."""
    running = {name: linears(name) for name in FORMATS}
    running["attention"] = start(ATTENTION, "test_is_attention or any_strides or masked_keys")
    for name, process in running.items():
        lines = process.communicate()[0].splitlines()
        print(name, *(line for line in lines if "ERROR SUMMARY" in line or " passed" in line or " failed" in line))
    return int(any(process.returncode for process in running.values()))


if __name__ == "__main__":
    sys.exit(main())
