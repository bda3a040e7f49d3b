"""compute-sanitizer's memcheck over the linears' GPU tests, one process per format: python tests/gpu/memcheck.py"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FORMATS = ("fp8_e4m3fn", "fp8_e5m2", "int8", "int8_convrot", "mxfp8", "nvfp4", "int4_convrot", "int4_asym")
TESTS = Path(__file__).with_name("test_linear.py")


def start(name: str) -> subprocess.Popen[str]:
    """The sanitizer over one format's tests of strides, alignment and strange values, every tensor its own allocation."""
    chosen = (
        f"(test_any_stride and 5-{name}) or (test_misaligned_weight and 1-{name}) or (test_strange_rows and {name})"
    )
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS), "-k", chosen]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *pytest]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def main() -> int:
    """0 when no format's run found an error."""
    running = {name: start(name) for name in FORMATS}
    for name, process in running.items():
        lines = process.communicate()[0].splitlines()
        print(name, *(line for line in lines if "ERROR SUMMARY" in line or " passed" in line or " failed" in line))
    return int(any(process.returncode for process in running.values()))


if __name__ == "__main__":
    sys.exit(main())
