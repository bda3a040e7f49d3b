"""What goes wrong ends the run with one sentence, and the next run works; no worker outlives its model or ComfyUI."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from lowbit.errors import MemoryBudgetError, WorkerError
from lowbit.host.several_gpus.trial import TRIES
from testing import comfyui
from testing.in_the_middle import in_the_middle
from testing.measure import relative_error

from .support import EXACT, Run

SOON = 10.0


@pytest.fixture(scope="module")
def run():
    return Run((1, 16, 3, 10, 14))


@pytest.fixture(scope="module")
def alone(load, run):
    return run.sample(load("wan"))


def gone(pid: int) -> bool:
    end = time.monotonic() + SOON
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def worker_pid(workers) -> int:
    return workers().workers[0].process.pid


def test_an_interrupt_in_the_middle_of_a_step(load, divide, workers, run, alone):
    import comfy.model_management as management

    model = divide(load("wan"))
    assert relative_error(run.sample(model), alone) <= EXACT
    pid, began = worker_pid(workers), time.monotonic()
    with (
        pytest.raises(management.InterruptProcessingException),
        in_the_middle(model, lambda: management.interrupt_current_processing(True)),
    ):
        run.sample(model)
    assert time.monotonic() - began < SOON
    assert relative_error(run.sample(model), alone) <= EXACT
    assert worker_pid(workers) == pid, "an interrupt is no reason to load the model anew"


def test_an_interrupt_while_a_worker_hangs(load, divide, workers, run, alone):
    import comfy.model_management as management

    model = divide(load("wan"))
    run.sample(model)
    pid = worker_pid(workers)
    interrupt = threading.Timer(0.5, management.interrupt_current_processing, [True])
    interrupt.start()
    try:
        with (
            pytest.raises(management.InterruptProcessingException),
            in_the_middle(model, lambda: os.kill(pid, signal.SIGSTOP)),
        ):
            run.sample(model)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert relative_error(run.sample(model), alone) <= EXACT
    assert worker_pid(workers) == pid


@pytest.mark.parametrize("when", ["in the middle of a step", "between two runs"])
def test_a_worker_that_dies(load, divide, workers, run, alone, when):
    model = divide(load("wan"))
    assert relative_error(run.sample(model), alone) <= EXACT
    pid = worker_pid(workers)
    if when == "between two runs":
        os.kill(pid, signal.SIGKILL)
        workers().workers[0].process.wait(SOON)
    else:
        with (
            pytest.raises(WorkerError, match=r"cpu:1 is gone.*run again"),
            in_the_middle(model, lambda: os.kill(pid, signal.SIGKILL)),
        ):
            run.sample(model)
    assert relative_error(run.sample(model), alone) <= EXACT
    assert worker_pid(workers) != pid


def test_a_worker_that_dies_while_processes_meet(host, load, divide, workers, run, alone, monkeypatch):
    model = divide(load("wan"))
    assert relative_error(run.sample(model), alone) <= EXACT
    pid = worker_pid(workers)
    workers().leave()
    meeting = host.team.process_group.Meeting

    def too_late(groups):
        monkeypatch.undo()
        os.kill(pid, signal.SIGKILL)
        return meeting(groups)

    monkeypatch.setattr(host.team.process_group, "Meeting", too_late)
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"cpu:1 is gone.*run again"):
        run.sample(model)
    assert time.monotonic() - began < SOON
    assert relative_error(run.sample(model), alone) <= EXACT


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [("memory", MemoryBudgetError, "cpu:1 ran out of memory"), ("error", WorkerError, "a broken weight")],
)
@pytest.mark.parametrize("split", ["sequence", "cfg"])
def test_a_worker_that_fails(host, load, divide, workers, run, alone, fault, error, words, split):
    model = divide(load("wan"), split)
    assert relative_error(run.sample(model), alone) <= EXACT
    pid = worker_pid(workers)
    (host.folder / "fault").write_text(fault)
    with pytest.raises(error, match=words):
        run.sample(model)
    assert not (host.folder / "fault").exists()
    assert relative_error(run.sample(model), alone) <= EXACT
    assert worker_pid(workers) == pid


def test_an_error_of_this_process_is_its_own(load, divide, run, alone):
    model = divide(load("wan"))

    def broken():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), in_the_middle(model, broken):
        run.sample(model)
    assert relative_error(run.sample(model), alone) <= EXACT


def test_running_out_of_memory_here_is_done_again_by_all(load, divide, parts, run, alone):
    """As a memory manager does it: never on one GPU alone."""
    model = divide(load("wan"))

    def exhausted():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError), in_the_middle(model, exhausted):
        run.sample(model)
    before = len(parts)
    assert relative_error(run.sample(model), alone) <= EXACT
    assert len(parts) > before


def test_running_out_of_memory_with_fewer_processes_is_done_again_by_all(host, load, divide, parts):
    """A number that only `auto` tries never costs the run."""
    model, run = load("wan"), Run((1, 16, 2, 8, 12), cfg=1.0)
    forward, failed = host.team.Team.forward, []

    def of_fewer(team, run, given):
        if given[0].split == "all 1":
            failed.append(given)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(team, run, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host.team.Team, "forward", of_fewer)
        got = run.sample(divide(model, "auto"), TRIES + 2)
    assert relative_error(got, run.sample(model, TRIES + 2)) <= EXACT
    assert (len(failed), parts) == (1, ["all"] * (TRIES + 2))


def test_a_file_that_a_worker_cannot_load(host, load, divide, run):
    """This process has read it already."""
    model = load("wan", "int8")
    path = Path(model.cached_patcher_init[1][0])
    moved = path.rename(path.with_suffix(".away"))
    try:
        with pytest.raises(WorkerError, match=path.name):
            run.sample(divide(model))
    finally:
        moved.rename(path)
    assert relative_error(run.sample(divide(model)), run.sample(model)) < 0.01


def test_a_file_that_is_written_anew_is_another_model(host, load, divide, run, tmp_path):
    """Whose worker has the old one, which still lives."""
    from testing import tiny

    from .conftest import CONFIGS

    path, config = tmp_path / "wan.safetensors", CONFIGS["wan"]
    models = []
    for seed in (1, 2):
        written = tmp_path / "new"
        tiny.write_file(written, tiny.draw(tiny.wan.shapes(config), seed), config.metadata())
        written.rename(path)
        models.append(host.loading.load_diffusion_model(str(path)))
        expected = run.sample(models[-1])
        assert relative_error(run.sample(divide(models[-1])), expected) <= EXACT
    assert not divide.said


def test_workers_go_with_the_last_model(host, run):
    """A team of its own: the other tests' models stay."""
    import comfy.model_management as management

    devices = (torch.device("cpu"), torch.device("cpu:0"))
    divided = [
        host.dividing.divide(host.loading.load_diffusion_model(str(host.folder / "wan.safetensors")), devices, "auto")
        for _ in range(2)
    ]
    team = host.dividing._TEAMS[devices]
    assert team.workers[0].alive, "it starts with the node"
    for model in divided:
        run.sample(model)
    stages = team.stages()["cpu:0:1"]
    assert stages["Python"] < stages["PyTorch"] < stages["ComfyUI"] < stages["pack"]
    assert stages["pack"] < stages["model's file"] < stages["model"] < stages["first run"]
    assert stages["pack"] < stages["group"] < stages["first run"]
    pid, meeting = team.workers[0].process.pid, Path(team._meeting.name)
    assert meeting.is_dir(), "NCCL's processes meet there when they first send something"
    assert meeting.stat().st_mode & 0o077 == 0
    for left in (1, 0):
        management.unload_all_models()
        del divided[left:]
        model = None
        gc.collect()
        assert psutil.pid_exists(pid) == bool(left) or gone(pid)
    assert not meeting.exists()


def test_a_worker_that_was_started_for_nothing_goes_too(host):
    """Its model is dropped before anything is sampled."""
    devices = (torch.device("cpu"), torch.device("cpu:1"))
    model = host.loading.load_diffusion_model(str(host.folder / "wan.safetensors"))
    divided = host.dividing.divide(model, devices, "auto")
    pid = host.dividing._TEAMS[devices].workers[0].process.pid
    assert psutil.pid_exists(pid)
    del model, divided
    gc.collect()
    assert gone(pid)


def test_a_model_that_goes_to_other_gpus_leaves_those_before(host):
    """The node was run again with other numbers: its weights would stay on all of them."""
    model = host.loading.load_diffusion_model(str(host.folder / "wan.safetensors"))
    teams = [(torch.device("cpu"), torch.device("cpu", index)) for index in (2, 3)]
    divided, pids = [], []
    for devices in teams:
        divided.append(host.dividing.divide(model, devices, "auto"))
        pids.append(host.dividing._TEAMS[devices].workers[0].process.pid)
    assert gone(pids[0])
    assert psutil.pid_exists(pids[1])
    host.dividing._TEAMS[teams[1]].close()


PARENT = """
import os, sys, time, torch
sys.path += [{comfyui!r}, {root!r}, {here!r}]
from comfy.cli_args import args
args.cpu = True
from lowbit.host.dividing import divide, _TEAMS
from lowbit.host.weights.loading import load_diffusion_model
from support import Run
with torch.inference_mode():
    model = divide(load_diffusion_model({path!r}), [torch.device("cpu")] * 2, "sequence")
    pid = next(iter(_TEAMS.values())).workers[0].process.pid
    run = Run((1, 16, 3, 10, 14))
    if {early}:
        holder = os.fork() or time.sleep({early}) or os._exit(0)
        print(pid, flush=True)
    run.sample(model)
    print(pid, flush=True)
    while True:
        run.sample(model, 20)
"""


@pytest.mark.parametrize("early", [0, 2 * SOON])
def test_comfyui_killed_leaves_no_worker_and_no_folder(host, tmp_path, early):
    """In the middle of a run, or while the worker starts and a process that ComfyUI forked holds its socket open."""
    here = Path(__file__).resolve().parent
    script = PARENT.format(
        comfyui=str(comfyui.find()),
        root=str(comfyui.CHECKOUT),
        here=str(here),
        path=str(host.folder / "wan.safetensors"),
        early=early,
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    assert early or list(tmp_path.glob("lowbit-*"))
    parent.kill()
    parent.wait()
    assert gone(pid)
    assert not list(tmp_path.glob("lowbit-*"))
