"""A worker's loop: holds copies of models, takes its part of every forward, and ends with ComfyUI."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shutil
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import comfy.model_management
import torch

from ...attention.sequence_split import Exchange
from ..model_copy import Copies
from . import plain_data, process_group
from .channel import Channel, Message
from .forward import NotSplitError

log = logging.getLogger("lowbit.several_gpus")

_BY_LOADER = frozenset({"file", "model", "begin", "forget"})
"""What has to do with models, in its order."""
_BESIDE_LOADER = frozenset({"join", "stages"})
"""What waits for no model."""


def serve(connection: Connection, reached: dict[str, float]) -> None:
    """A worker's work, from its first message to its end; `reached`: when its start came how far."""
    Worker(Channel(connection), Copies(), reached).serve()


class Worker:
    """One process; see `team.Team` for what it is told.

    Models are loaded on a thread of their own: meanwhile the processes meet.

    Args:
        channel: to ComfyUI.
        copies: the models.
        reached: when the process came how far; what is reached from now on is added.
    """

    def __init__(self, channel: Channel, copies: Copies, reached: dict[str, float]):
        self._channel = channel
        self._copies = copies
        self._reached = reached
        self._loader = ThreadPoolExecutor(1, "lowbit-loader")
        self._loading: Future[None] | None = None
        self._device = comfy.model_management.get_torch_device()
        self._messages: queue.SimpleQueue[tuple[Message, list[torch.Tensor]]] = queue.SimpleQueue()
        self._groups: dict[str, process_group.ProcessGroup] = {}
        self._speeds: dict[str, Sequence[float]] = {}
        self._generation = self._stopped = -1
        self._meeting_place: str | None = None

    def serve(self) -> None:
        """Does what it is told until ComfyUI is gone."""
        threading.Thread(target=self._listen, daemon=True).start()
        self._reach("pack")
        self._tell({"reply": "started"})
        while True:
            message, tensors = self._messages.get()
            # What an earlier forward was stopped with.
            comfy.model_management.interrupt_current_processing(False)
            if message["do"] in _BY_LOADER:
                self._loading = self._loader.submit(self._do, message, tensors)
                continue
            if message["do"] not in _BESIDE_LOADER and self._loading is not None:
                self._loading.result()
            self._do(message, tensors)

    def _do(self, message: Message, tensors: list[torch.Tensor]) -> None:
        try:
            with torch.inference_mode():
                getattr(self, f"_do_{message['do']}")(message, tensors)
        except BaseException as error:  # noqa: BLE001  # whatever it is, ComfyUI has to hear of it
            self._fail(message, error)

    def _tell(self, reply: Message) -> None:
        """To ComfyUI; where it is gone, `_listen` ends this process."""
        with contextlib.suppress(OSError):
            self._channel.send(reply)

    def _reach(self, stage: str) -> None:
        """For the first time."""
        self._reached.setdefault(stage, time.time())

    def _listen(self) -> None:
        try:
            while True:
                message, tensors = self._channel.receive()
                if message["do"] == "stop":
                    self._stop(message["generation"])
                else:
                    self._messages.put((message, tensors))
        except (EOFError, OSError):
            if self._meeting_place is not None:  # ComfyUI may have been killed
                shutil.rmtree(self._meeting_place, ignore_errors=True)
            os._exit(0)  # the other thread may be waiting for a GPU

    def _stop(self, generation: int) -> None:
        self._stopped = max(self._stopped, generation)
        comfy.model_management.interrupt_current_processing(True)
        for group in list(self._groups.values()):
            group.end()

    def _fail(self, message: Message, error: BaseException) -> None:
        lines = traceback.format_exception_only(error)
        stopped = message.get("generation", self._stopped + 1) <= self._stopped
        if not stopped:
            log.warning("%s", "".join(traceback.format_exception(error)))
        # Told before the group is left: the others' complaints come later.
        self._tell(
            {
                "reply": "failed",
                "to": message["do"],
                "model": message.get("model"),
                "generation": message.get("generation"),
                "text": lines[-1].strip(),
                "memory": bool(comfy.model_management.is_oom(error)),
            }
        )
        error.__traceback__ = None
        if message["do"] in ("join", "run"):
            self._leave()
        if message["do"] == "run":
            self._copies.end()

    def _leave(self) -> None:
        for group in self._groups.values():
            group.end()
        self._groups = {}
        self._generation = -1

    def _do_file(self, message: Message, tensors: list[torch.Tensor]) -> None:
        # What goes wrong is said when the model is sent.
        with contextlib.suppress(Exception):
            self._copies.load_file(message["model"], plain_data.put_together(message["file"], tensors))
            self._reach("model's file")

    def _do_model(self, message: Message, tensors: list[torch.Tensor]) -> None:
        self._copies.take(message["model"], plain_data.put_together(message["description"], tensors))
        self._reach("model")
        self._tell({"reply": "model", "model": message["model"]})

    def _do_forget(self, message: Message, tensors: list[torch.Tensor]) -> None:
        self._copies.forget(message["model"])

    def _do_stages(self, message: Message, tensors: list[torch.Tensor]) -> None:
        self._tell({"reply": "stages", "reached": self._reached})

    def _do_speed(self, message: Message, tensors: list[torch.Tensor]) -> None:
        self._tell({"reply": "speed", "speed": process_group.speed(self._device)})

    def _do_join(self, message: Message, tensors: list[torch.Tensor]) -> None:
        if message["generation"] != self._generation:
            self._leave()
            self._generation, self._meeting_place = message["generation"], message["folder"]
        groups = {}
        for name, ranks in message["groups"].items():
            if message["rank"] in ranks and len(ranks) > 1:
                place = Path(message["folder"]) / name
                rank = ranks.index(message["rank"])
                groups[name] = process_group.join(place, rank, len(ranks), self._device)
        self._groups |= groups
        self._speeds |= message["speeds"]
        self._tell({"reply": "join", "generation": message["generation"]})
        for group in groups.values():
            group.meet()
        self._reach("group")
        self._tell({"reply": "met", "generation": message["generation"]})

    def _do_begin(self, message: Message, tensors: list[torch.Tensor]) -> None:
        self._copies.begin(message["model"])

    def _do_run(self, message: Message, tensors: list[torch.Tensor]) -> None:
        if message["generation"] <= self._stopped:
            return
        value, inputs = plain_data.from_json(message["call"].encode(), self._device)
        self._groups[message["inputs"]].send_to_all(inputs)
        group = self._groups.get(message["split"])
        model, split = message["model"], None
        if group is not None:
            speeds = self._speeds[message["split"]]
            split = self._copies.splitting(model, group, speeds, Exchange(**message["exchange"]))
        try:
            out = self._copies.forward(model, plain_data.put_together(value, inputs), split)
        except NotSplitError:
            out = torch.empty(0, device=self._device)
        if message["output"]:
            self._groups[message["inputs"]].hand_over(out)

    def _do_settle(self, message: Message, tensors: list[torch.Tensor]) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._copies.end()
        self._reach("first run")
        self._tell({"reply": "settle", "generation": message["generation"]})
