"""A worker's first seconds: a context while Python imports, a group while a model is loaded."""

from __future__ import annotations

import ctypes
import importlib.util
import queue
import threading
import types
from pathlib import Path

import pytest

SOON = 20.0


@pytest.fixture
def start_worker(host):
    """The worker's first file, as a module."""
    path = Path(host.process.__file__).with_name("start_worker.py")
    spec = importlib.util.spec_from_file_location("start_worker_of_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_context_is_made_of_the_first_gpu(start_worker, monkeypatch):
    calls = []
    driver = types.SimpleNamespace(
        cuInit=lambda flags: calls.append(("init", flags)) or 0,
        cuDevicePrimaryCtxRetain=lambda context, device: calls.append(("retain", device)) or 0,
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    start_worker.make_context()
    assert calls == [("init", 0), ("retain", 0)]


def test_where_there_is_no_driver_pytorch_says_so(start_worker, monkeypatch):
    monkeypatch.setattr(start_worker, "_DRIVER", "libnone.so")
    start_worker.make_context()


@pytest.mark.parametrize(("environment", "cuda"), [({}, False), ({"CUDA_VISIBLE_DEVICES": "1,0"}, True)])
def test_a_worker_on_a_cpu_makes_none(host, monkeypatch, environment, cuda):
    monkeypatch.setattr(host.process.subprocess, "Popen", lambda *args, **kwargs: None)
    sent = []
    monkeypatch.setattr(host.process.Channel, "send", lambda self, message, tensors=(): sent.append(message))
    monkeypatch.setattr(host.process.WorkerProcess, "_listen", lambda self: None)
    host.process.WorkerProcess("x", environment, lambda message: None)
    assert [message["cuda"] for message in sent] == [cuda]


def test_a_model_that_does_not_load_leaves_processes_that_meet_alone(host, monkeypatch):
    """Whoever waits for one that has left them cannot be woken, and the next run waits for both."""
    from lowbit.errors import WorkerError

    monkeypatch.setattr(host.process.subprocess, "Popen", lambda *args, **kwargs: None)
    monkeypatch.setattr(host.process.Channel, "send", lambda self, message, tensors=(): None)
    monkeypatch.setattr(host.process.WorkerProcess, "_listen", lambda self: None)
    one = host.process.WorkerProcess("x", {}, lambda message: None)
    one.pending += ["a", "b"]
    failed = {
        "reply": "failed",
        "to": "model",
        "model": "a",
        "generation": None,
        "memory": False,
        "text": "no such file",
    }
    for message in (failed, {"reply": "join", "generation": 1}, {"reply": "model", "model": "b"}):
        one._replies.put(message)
    assert one.expect("join", generation=1)["reply"] == "join"
    with pytest.raises(WorkerError, match="no such file"):
        one.await_models()
    one.await_models()


def test_a_worker_that_cannot_tell_any_more_waits_for_its_end(host):
    """ComfyUI went, or dropped the model, while it started: no traceback in the user's console."""
    from lowbit.host.several_gpus import worker

    def send(message, tensors=()):
        raise BrokenPipeError

    one = worker.Worker(types.SimpleNamespace(send=send), None, {})
    one._do({"do": "stages"}, [])
    one._do({"do": "none"}, [])


def test_processes_meet_while_a_model_is_loaded(host, monkeypatch):
    from lowbit.host.several_gpus import worker

    monkeypatch.setattr(worker.Worker, "_listen", lambda self: None)
    loading, go_on, told, done = threading.Event(), threading.Event(), queue.Queue(), []

    def take(model, description):
        loading.set()
        go_on.wait(SOON)
        done.append(model)

    copies = types.SimpleNamespace(take=take, end=lambda: done.append("end"))
    channel = types.SimpleNamespace(send=lambda message, tensors=(): told.put(message["reply"]))
    one = worker.Worker(channel, copies, {})
    for message in (
        {"do": "model", "model": "a", "description": {}},
        {"do": "join", "generation": 1, "folder": "", "groups": {}, "speeds": {}},
        {"do": "settle", "generation": 1},
    ):
        one._messages.put((message, []))
    threading.Thread(target=one.serve, daemon=True).start()
    assert loading.wait(SOON)
    assert [told.get(timeout=SOON) for _ in range(3)] == ["started", "join", "met"]
    assert told.empty()
    go_on.set()
    assert [told.get(timeout=SOON) for _ in range(2)] == ["model", "settle"]
    assert done == ["a", "end"], "a run begins, or ends, with the model"
    one._loader.shutdown()
