"""A wait ends when a process hangs, and for no number of seconds while it works."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from testing import server

SILENT = 1.0


@pytest.fixture
def process(monkeypatch):
    """Starts a process that runs a piece of Python; the limits are those of a second."""
    monkeypatch.setattr(server, "SILENT_SECONDS", SILENT)
    monkeypatch.setattr(server, "WORK_SECONDS", 0.05)
    started = []

    def start(code: str) -> subprocess.Popen:
        started.append(subprocess.Popen([sys.executable, "-c", f"print(flush=True)\n{code}"], stdout=subprocess.PIPE))
        started[-1].stdout.readline()
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.communicate()


def watch(progress: server.Progress, seconds: float, *, seen: bool = False) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        progress.check("it")
        if seen:
            progress.seen()
        time.sleep(0.05)


def test_a_process_that_only_waits_hangs(process):
    with pytest.raises(TimeoutError, match="it hangs"):
        watch(server.Progress(process("import time; time.sleep(600)").pid), 600)


def test_a_process_that_computes_does_not_however_long_it_says_nothing(process):
    watch(server.Progress(process("while True: pass").pid), 4 * SILENT)


def test_a_process_that_says_something_does_not(process):
    watch(server.Progress(process("import time; time.sleep(600)").pid), 3 * SILENT, seen=True)
