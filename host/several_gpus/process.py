"""One worker process as ComfyUI sees it: started by its path, spoken to over a pair of sockets, ended with the last model."""

from __future__ import annotations

import contextlib
import inspect
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import comfy.memory_management
import comfy.model_management
import torch
from comfy.cli_args import args

from ...errors import WorkerError
from .channel import Channel, Message

_START = Path(__file__).with_name("start_worker.py")
_PACK = Path(__file__).resolve().parents[2]
_GRACE = 5.0
_LOOK_FOR_INTERRUPT = 0.2
"""Seconds, while a worker loads a model."""
_PLAIN = (str, int, float, bool, type(None))


class WorkerProcess:
    """A worker from its start to its end.

    Args:
        name: as messages call it, such as cuda:1.
        environment: variables that the process gets besides ComfyUI's.
        on_trouble: called from another thread with what befell a forward of the worker, or the worker itself.
    """

    def __init__(self, name: str, environment: dict[str, str], on_trouble: Callable[[Message], None]):
        self.name = name
        self.has_model: dict[str, Any] = {}
        self.pending: list[str] = []
        self.began = time.time()
        self._started = False
        self._not_loaded: str | None = None
        # Asked while another thread waits for the process, Popen does not know whether it runs.
        self._hung_up = False
        self._on_trouble = on_trouble
        self._replies: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._channel, there = Channel.pair()
        with there:
            self.process = subprocess.Popen(
                [sys.executable, str(_START), str(there.fileno()), str(os.getpid())],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | environment,
            )
        threading.Thread(target=self._listen, daemon=True).start()
        self.send(_first_message(name, "CUDA_VISIBLE_DEVICES" in environment))

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return not self._hung_up and self.process.poll() is None

    def send(self, message: Message, tensors: Sequence[torch.Tensor] = ()) -> None:
        """Raises WorkerError where the worker is gone."""
        try:
            self._channel.send(message, tensors)
        except OSError:
            raise WorkerError(self._gone()) from None

    def expect(self, reply: str, **values: Any) -> Message:
        """Waits for a reply with these values; what belongs to an earlier forward is passed over.

        A model that the worker could not load is left for `await_models` to tell: the processes may be about to meet,
        and who has come is not woken when another stays away.

        Raises:
            WorkerError: the worker could not do it, or is gone.
        """
        while True:
            try:
                message = self._replies.get(timeout=_LOOK_FOR_INTERRUPT)
            except queue.Empty:
                comfy.model_management.throw_exception_if_processing_interrupted()
                continue
            if message["reply"] == "gone":
                self._replies.put(message)
                raise WorkerError(self._gone())
            earlier = message.get("generation") not in (None, values.get("generation"))
            if message["reply"] == "failed" and message["to"] not in ("model", "run") and not earlier:
                raise WorkerError(self.sentence(message))
            self._started |= message["reply"] == "started"
            if message["reply"] == "failed" and message["to"] == "model":
                self.has_model.pop(message["model"], None)
                self._not_loaded = self.sentence(message)
                message = {"reply": "model", "model": message["model"]}
            if message["reply"] == "model" and message["model"] in self.pending:
                self.pending.remove(message["model"])
            if message["reply"] == reply and all(message.get(name) == value for name, value in values.items()):
                return message

    def await_start(self) -> None:
        """Waits until the worker listens. Raises as `expect`."""
        while not self._started:
            self.expect("started")

    def await_models(self) -> None:
        """Waits until the worker has every model that it was sent. Raises as `expect`."""
        while self.pending:
            self.expect("model")
        sentence, self._not_loaded = self._not_loaded, None
        if sentence is not None:
            raise WorkerError(sentence)

    def sentence(self, message: Message) -> str:
        """What befell the worker, for the user."""
        if message["reply"] == "gone":
            return self._gone()
        if message["memory"]:
            return (
                f"{self.name} ran out of memory in its part of a step, which is not done again on one GPU: choose a smaller "
                "format for the model or a smaller picture."
            )
        return f"The worker on {self.name} failed, and the run ended ({message['text']}): run again, or use one GPU."

    def close(self) -> None:
        """Ends the process: by itself if it will, at once if not."""
        with contextlib.suppress(OSError):
            self._channel.close()
        try:
            self.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _gone(self) -> str:
        code = self.process.poll()
        how = "" if code is None else f" (exit code {code})"
        return f"The worker process on {self.name} is gone{how}, and the run ended: run again, which starts it anew."

    def _listen(self) -> None:
        try:
            while True:
                message, _ = self._channel.receive()
                self._replies.put(message)
                if message["reply"] == "failed" and message["to"] == "run":
                    self._on_trouble(message | {"worker": self})
        except (EOFError, OSError):
            self._hung_up = True
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_GRACE)
            self._replies.put({"reply": "gone"})
            self._on_trouble({"reply": "gone", "worker": self})


def _first_message(name: str, cuda: bool) -> Message:
    """What start_worker.py needs to become a ComfyUI without nodes; `cuda`: on a GPU."""
    settings: dict[str, Any] = {key: value for key, value in vars(args).items() if isinstance(value, _PLAIN)}
    fast = [feature.value for feature in vars(args).get("fast") or () if isinstance(feature, Enum)]
    return {
        "name": f"Several GPUs, {name}",
        "comfyui": str(Path(inspect.getfile(comfy.model_management)).resolve().parents[1]),
        "pack": str(_PACK),
        "settings": settings,
        "cuda": cuda,
        "dynamic_vram": comfy.memory_management.aimdo_enabled,
        "fast": fast,
    }
