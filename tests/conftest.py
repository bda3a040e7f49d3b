"""Marks tests by folder, leaves out those that need a ComfyUI or a GPU that is not there, and says so in one last line."""

from __future__ import annotations

import functools
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

TESTS = Path(__file__).resolve().parent

if sys.dont_write_bytecode:
    # Or each of the many processes (ComfyUI's, the command line's) would compile PyTorch's sources anew, for 8 seconds.
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(TESTS.parent / ".pytest_cache" / "bytecode")
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": sys.pycache_prefix}
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    # Threads that wait for each other's core took half as much time again.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
os.environ["LOWBIT_QUICK_TESTS"] = "1"  # testing/shims/quick.py
os.fsync = lambda file: None  # what a test writes need not survive a power cut

import torch  # noqa: E402

sys.path.append(str(TESTS.parent))  # for demo/, testing/ and tools/, which are not part of the installed package

from testing import comfyui  # noqa: E402

# How long an example takes says how busy the machine is. On a GPU nearly every one has kernels of its own compiled.
settings.register_profile("lowbit", deadline=None, max_examples=20 if torch.cuda.is_available() else 100)
settings.load_profile("lowbit")

MARK_OF_FOLDER = {"headless": pytest.mark.headless, "gpu": pytest.mark.gpu}
LEFT_OUT = "left_out"
LONGEST_FIRST = (
    "headless/test_loaders.py",
    "browser/test_workflows.py",
    "kernels/test_in_interpreter.py",
    "kernels/test_in_compiler.py",
    "headless/test_memory_recovery.py",
    "headless/test_memory_benchmark.py",
    "nodes/test_missing_names.py",
    "headless/test_demo.py",
    "headless/test_attention.py",
    "host/several_gpus/test_faults.py",
    "host/weights/test_quantizing.py",
    "demo/test_demo.py",
    "tools/test_training_models.py",
)
"""Files that take half a minute and more. Of processes that take whole files, none shall be left alone with one."""

TOGETHER = (
    ("browser/",),
    ("nodes/",),
    ("host/several_gpus/",),
    ("headless/test_memory.py", "headless/test_memory_recovery.py", "headless/test_memory_report.py"),
    tuple(
        f"headless/test_{name}.py"
        for name in (
            "attention",
            "bad_input",
            "command_line",
            "foreign",
            "gguf",
            "interrupt",
            "loaders",
            "lora",
            "optimize",
            "save",
            "several_gpus",
            "text_generation",
            "tiny",
            "workflows",
        )  # fmt: skip
    ),
)
"""Beginnings of the names of files that ask for the same ComfyUI, or the same worker: one process runs them all, instead of one each."""


def comfyui_required() -> bool:
    """Whether a missing ComfyUI is a failure (.ci/run sets LOWBIT_REQUIRE_COMFYUI=1)."""
    return os.environ.get("LOWBIT_REQUIRE_COMFYUI", "0") not in ("", "0")


@functools.cache
def missing_comfyui() -> str | None:
    """Why there is no ComfyUI, None when there is one."""
    try:
        comfyui.find()
    except comfyui.ComfyUIMissingError as missing:
        return f"need ComfyUI ({missing}; set COMFYUI_PATH)"
    return None


def missing_gpu() -> str | None:
    """Why there is no NVIDIA GPU, None when there is one."""
    return None if torch.cuda.is_available() else "need an NVIDIA GPU"


MISSING = {"headless": missing_comfyui, "gpu": missing_gpu}


class LeftOut:
    """Counts the tests that were left out, by what they were missing, from the reports of every worker process."""

    def __init__(self) -> None:
        self.subjects: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.subjects.update(value for name, value in report.user_properties if name == LEFT_OUT)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(LeftOut(), LEFT_OUT)
    config.option.loadscopereorder = False  # pytest-xdist would begin with the files of the most tests


def _turn(item: pytest.Item) -> int:
    """The place of a test's file among those that begin."""
    name = item.path.relative_to(TESTS).as_posix() if item.path.is_relative_to(TESTS) else ""
    return LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files for a process, as `--dist loadfile` has it, and those of TOGETHER for one and the same."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            name = file.removeprefix("tests/")
            return next((str(group) for group in TOGETHER if name.startswith(group)), file)

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_turn)
    for item in items:
        parents = Path(item.path).relative_to(TESTS).parts if Path(item.path).is_relative_to(TESTS) else ()
        for folder, mark in MARK_OF_FOLDER.items():
            if folder in parents[:1]:
                item.add_marker(mark)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name, missing in MISSING.items():
        if item.get_closest_marker(name) is not None and (reason := missing()):
            pytest.skip(reason)


def _subject(reason: str) -> str:
    """What a skipped test was missing, for the closing line."""
    if "ComfyUI" in reason:
        return missing_comfyui() or "need another ComfyUI"
    if "GPU" in reason or "CUDA" in reason:
        return missing_gpu() or "need another GPU"
    return reason if reason.startswith("need ") else f"say: {reason}"


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """Where ComfyUI is; skips where there is none."""
    if missing := missing_comfyui():
        pytest.skip(missing)
    return comfyui.find()


@pytest.fixture(scope="session")
def core_modules(comfyui_path: Path) -> None:
    """Makes ComfyUI's modules importable here, on their CPU setting."""
    if str(comfyui_path) not in sys.path:
        sys.path.append(str(comfyui_path))
    from comfy.cli_args import args

    args.cpu = True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """Counts what is left out; a missing ComfyUI that is required makes the test a failure."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
        if "ComfyUI" in reason and comfyui_required() and missing_comfyui():
            report.outcome = "failed"
            report.longrepr = f"LOWBIT_REQUIRE_COMFYUI is set, but tests {missing_comfyui()}"
        else:
            report.user_properties.append((LEFT_OUT, _subject(reason)))
    return report


def pytest_unconfigure(config: pytest.Config) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    left_out = config.pluginmanager.get_plugin(LEFT_OUT).subjects
    if reporter is not None and left_out:
        parts = [f"{count} test{'s' if count > 1 else ''} that {reason}" for reason, count in left_out.items()]
        reporter.write_line("Left out: " + ", and ".join(parts) + ".")
