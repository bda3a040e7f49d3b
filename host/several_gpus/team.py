"""The workers of a set of GPUs: started with the node or the run, given models and forwards, stopped together, ended with the last model."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import torch

from ...attention.environment import detect
from ...attention.sequence_split import Exchange
from ...errors import MemoryBudgetError, WorkerError
from ...kernels.measured import MeasuredNumbers
from . import plain_data, process_group
from .channel import Message
from .forward import CoreForward
from .process import WorkerProcess
from .trial import FILE_NAME, Trial

log = logging.getLogger("lowbit.several_gpus")

ALL, FIRST, SECOND, LINK = "all", "first", "second", "link"
"""All processes; those of the one prompt and of the other; the first process with those of the other. Fewer of them: `_few`."""
_UNEQUAL = 1.1
"""GPUs within a tenth of each other get equal parts."""
_PIECES, _PIECES_ON_SLOW_LINKS = 2, 4
"""In which heads travel between GPUs: all but one are on their way while another is attended to."""
_CAUSE = 2.0
"""Seconds to wait for the cause when a transfer breaks off."""
_LOOK_FOR_INTERRUPT = 0.2


@dataclass(frozen=True)
class Part:
    """What some of the processes do in a forward.

    Attributes:
        inputs: the group that gets them.
        split: the group that splits tokens.
        output: whether the second process of `inputs` hands the result to the first.
        eight_bits: see `Exchange`.
    """

    inputs: str
    split: str
    output: bool = False
    eight_bits: bool = False


class Team:
    """ComfyUI's own process, which is the first, and a worker for each further device.

    A forward that does not come to its end, for whatever reason, ends the group of all processes: they leave it, and
    meet in a new one for the next forward. Nothing has to be agreed on in the middle, and whoever waits is woken.

    Args:
        devices: this process's, then the workers'. Those on a CPU are for tests.
        folder: where it is kept how many of them are the fastest; None: nowhere.
    """

    def __init__(self, devices: Sequence[torch.device], folder: Path | None = None):
        self.devices = tuple(devices)
        self.workers: list[WorkerProcess] = []
        # Names are never used again, as addresses are.
        self._names: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self._models: set[str] = set()
        self._count = itertools.count()
        self._known_speeds: list[float] | None = None
        self._kept = MeasuredNumbers(folder, FILE_NAME)
        self._trials: dict[str, Trial] = {}
        self._joined: set[str] = set()
        self._groups: dict[str, process_group.ProcessGroup] = {}
        self._meeting: tempfile.TemporaryDirectory[str] | None = None
        self._generation = 0
        self._trouble: Message | None = None
        self._troubled = threading.Event()
        self._lock = threading.Lock()
        slow = process_group.slow_links(self.devices)
        self._pieces = _PIECES_ON_SLOW_LINKS if slow else _PIECES

    @property
    def ranks(self) -> dict[str, list[int]]:
        """The processes of each group."""
        every = list(range(len(self.devices)))
        groups = {self._few(ALL, count): every[:count] for count in self.counts(False)}
        for count in self.counts(True):
            # Neighbours: GPUs of one switch or processor have numbers next to each other.
            second = every[count : 2 * count]
            groups |= {self._few(FIRST, count): every[:count], self._few(SECOND, count): second}
            groups[self._few(LINK, count)] = [0, *second]
        return groups

    def counts(self, by_prompt: bool) -> list[int]:
        """Of how many processes a forward can be, all of them and ever half as many; `by_prompt`: for each of two prompts, or none."""
        most = len(self.devices)
        if by_prompt:
            most = 0 if most % 2 else most // 2
        return [most >> halvings for halvings in range(most.bit_length())]

    def parts(self, by_prompt: bool, count: int) -> list[Part]:
        """What the processes do in a forward of `count` of them, or of as many for each of two prompts."""
        if not by_prompt:
            return [Part(self._few(ALL, count), self._few(ALL, count))]
        first, second, link = (self._few(name, count) for name in (FIRST, SECOND, LINK))
        return [Part(first, first), Part(link, second, output=True)]

    def trial(self, what: str, counts: Sequence[int]) -> Trial:
        """Which of `counts` is the fastest for a model and size, `what`."""
        if what not in self._trials:
            where = f"{detect(self.devices[0]).fingerprint()}; {', '.join(map(_kind, self.devices))}"
            self._trials[what] = Trial(counts, self._kept, where, what)
        return self._trials[what]

    def _few(self, name: str, count: int) -> str:
        """The name of a group where only so many processes are in ALL, FIRST or SECOND."""
        return name if count == self.counts(name != ALL)[0] else f"{name} {count}"

    def start(self, owner: object, file: tuple[Any, list[torch.Tensor]]) -> None:
        """Starts the workers that are missing, and has them load the file of a model that they will be sent, without waiting.

        Args:
            owner: what the model lives and dies with.
            file: its loader and the loader's arguments, encoded.

        Raises:
            WorkerError, OSError: a worker is gone, or the system starts none.
        """
        with self._lock:
            model = self._name_of(owner)
            self._start()
            for worker in self.workers:
                worker.send({"do": "file", "model": model, "file": file[0]}, file[1])

    def stages(self) -> dict[str, dict[str, float]]:
        """Seconds from a worker's start to each stage that it has reached, by its name. Raises as `forward`."""
        with self._lock:
            for worker in self.workers:
                worker.send({"do": "stages"})
            found = {worker.name: (worker.expect("stages")["reached"], worker.began) for worker in self.workers}
        return {name: {stage: at - began for stage, at in reached.items()} for name, (reached, began) in found.items()}

    def prepare(self, owner: object, version: Any, describe: Callable[[], tuple[Any, list[torch.Tensor]]]) -> str:
        """Starts the workers that are missing and sends them a model, without waiting for them; returns its name there.

        Args:
            owner: what the model lives and dies with.
            version: what its copy depends on; one that is equal is not sent again.
            describe: makes the description that is sent, encoded.
        """
        with self._lock:
            model = self._name_of(owner)
            self._start()
            described = None
            for worker in self.workers:
                if worker.has_model.get(model) != version:
                    described = described or describe()
                    value, tensors = described
                    worker.send({"do": "model", "model": model, "description": value}, tensors)
                    worker.has_model[model] = version
                    worker.pending.append(model)
                worker.send({"do": "begin", "model": model})
            return model

    def let_go(self, owner: object) -> None:
        """Another team has a model from now on; as if it were gone."""
        name = self._names.pop(owner, None)
        if name is not None:
            self._forget_soon(name)

    def close(self) -> None:
        """Ends the workers."""
        self.leave()
        workers, self.workers = self.workers, []
        for worker in workers:
            worker.close()

    def leave(self) -> None:
        """This process leaves the group; the next forward makes a new one."""
        for group in self._groups.values():
            group.end()
        self._groups = {}
        self._joined.clear()
        if self._meeting is not None:
            self._meeting.cleanup()
            self._meeting = None

    def forward(self, run: Callable[[], Any], parts: Sequence[Part]) -> Any:
        """`run()`, which may call `send` and have tokens split for these parts; ready before it, and checked after it.

        Raises:
            WorkerError, MemoryBudgetError: a worker failed, or is gone.
        """
        with self._lock:
            self._join({name for part in parts for name in (part.inputs, part.split)})
            self._await_models()
            try:
                out = run()
                self._check()
                return out
            except BaseException as error:
                cause = self._cause_of(error)
                self._stop()
                if cause is not None:
                    raise cause from None
                raise

    def send(self, model: str, call: tuple[Any, list[torch.Tensor]], part: Part) -> None:
        """Has the other processes of a part do a forward with these inputs, encoded."""
        value, tensors = call
        tensors = [tensor.to(self.devices[0]).contiguous() for tensor in tensors]
        message = {
            "do": "run",
            "model": model,
            "generation": self._generation,
            "call": plain_data.as_json(value, tensors).decode(),
            "inputs": part.inputs,
            "split": part.split,
            "exchange": asdict(self._exchange(part)),
            "output": part.output,
        }
        for rank in self.ranks[part.split]:
            if rank:
                self.workers[rank - 1].send(message)
        if part.inputs in self._groups:
            self._groups[part.inputs].send_to_all(tensors)

    def split(self, network: Any, family: Any, part: Part) -> CoreForward | None:
        """How this process's forward is split; None where it has the part for itself."""
        group = self._groups.get(part.split)
        speeds = [self.speeds[rank] for rank in self.ranks[part.split]]
        return None if group is None else CoreForward(network, family, group, speeds, self._exchange(part))

    def _exchange(self, part: Part) -> Exchange:
        return Exchange(self._pieces, eight_bits=part.eight_bits)

    def take_over(self, out: torch.Tensor, part: Part) -> torch.Tensor:
        """Fills `out` with the result of the part of others."""
        return self._groups[part.inputs].take_over(out)

    def settle(self) -> None:
        """Waits for every worker to be done with what it was given. Raises as `forward`."""
        with self._lock:
            self._await_models()
            try:
                for worker in self.workers:
                    worker.send({"do": "settle", "generation": self._generation})
                for worker in self.workers:
                    worker.expect("settle", generation=self._generation)
                self._check()
            except BaseException:
                self._stop()
                raise

    @property
    def speeds(self) -> list[float]:
        """How fast each process is beside the others; all alike where the GPUs have one name or nearly one speed."""
        if self._known_speeds is None:
            alike = len(set(map(_kind, self.devices))) == 1
            self._known_speeds = [1.0] * len(self.devices) if alike else self._measured()
        return self._known_speeds

    def _name_of(self, owner: Any) -> str:
        if owner not in self._names:
            self._names[owner] = name = f"model {next(self._count)}"
            self._models.add(name)
            weakref.finalize(owner, self._forget_soon, name).atexit = False
        return self._names[owner]

    def _forget_soon(self, model: str) -> None:
        """The garbage collector comes at any time, in the middle of a message as well."""
        threading.Thread(target=self._forget, args=(model,), daemon=True).start()

    def _forget(self, model: str) -> None:
        """The model is gone; with the last one go the workers."""
        with self._lock:
            self._models.discard(model)
            if not self._models:
                self.close()
            for worker in self.workers:
                worker.has_model.pop(model, None)
                with contextlib.suppress(WorkerError):
                    worker.send({"do": "forget", "model": model})

    def _measured(self) -> list[float]:
        for worker in self.workers:
            worker.send({"do": "speed"})
        found = [process_group.speed(self.devices[0])]
        found += [worker.expect("speed")["speed"] for worker in self.workers]
        return found if max(found) > _UNEQUAL * min(found) else [1.0] * len(found)

    def _start(self) -> None:
        """Starts the workers that are not there; whoever was in a group with one that died is in none."""
        alive = [worker for worker in self.workers if worker.alive]
        if len(alive) == len(self.devices) - 1:
            return
        self.leave()
        kept = {worker.name: worker for worker in alive}
        self.workers = [
            kept.get(_name(device, place))
            or WorkerProcess(_name(device, place), _environment(device), self._on_trouble)
            for place, device in enumerate(self.devices[1:], 1)
        ]
        # Now that nobody listens to those that are gone.
        self._trouble = None
        self._troubled.clear()

    def _join(self, needed: set[str]) -> None:
        """Meets the workers, which may be loading models, in the groups that nobody is in yet."""
        for worker in self.workers:
            worker.await_start()
        self._check()
        ranks = {name: members for name, members in self.ranks.items() if name in needed - self._joined}
        if not ranks:
            return
        if self._meeting is None:
            self._generation += 1
            # As long as the groups live: NCCL may connect two processes when they first send each other something.
            self._meeting = tempfile.TemporaryDirectory(prefix="lowbit-", ignore_cleanup_errors=True)
        folder = Path(self._meeting.name)
        speeds = {name: [self.speeds[rank] for rank in ranks[name]] for name in ranks}
        message = {
            "do": "join",
            "generation": self._generation,
            "folder": str(folder),
            "groups": ranks,
            "speeds": speeds,
        }
        groups: dict[str, process_group.ProcessGroup] = {}
        try:
            for rank, worker in enumerate(self.workers, 1):
                worker.send(message | {"rank": rank})
            for name, members in ranks.items():
                if 0 in members and len(members) > 1:
                    groups[name] = process_group.join(folder / name, 0, len(members), self.devices[0])
            self._groups |= groups
            self._joined |= set(ranks)
            # Whoever is about to meet those that are not there cannot be woken.
            for worker in self.workers:
                worker.expect("join", generation=self._generation)
            meeting = process_group.Meeting(groups.values())
            for worker in self.workers:
                worker.expect("met", generation=self._generation)
            while not meeting.done(_LOOK_FOR_INTERRUPT):
                comfy.model_management.throw_exception_if_processing_interrupted()
        except BaseException:
            self._stop()
            raise

    def _await_models(self) -> None:
        for worker in self.workers:
            worker.await_models()

    def _stop(self) -> None:
        """Has everyone leave the group, whatever they are at; what they say to it is of no account."""
        for worker in self.workers:
            with contextlib.suppress(WorkerError):
                worker.send({"do": "stop", "generation": self._generation})
        self.leave()
        self._generation += 1
        self._trouble = None
        self._troubled.clear()

    def _on_trouble(self, message: Message) -> None:
        """From a listening thread: wakes whoever waits for that worker."""
        stale = message["reply"] == "failed" and message["generation"] != self._generation
        if stale or message["worker"] not in self.workers:
            return
        if self._trouble is None:
            self._trouble = message
            self._troubled.set()
            for group in list(self._groups.values()):
                group.end()

    def _check(self) -> None:
        if self._trouble is not None:
            trouble, self._trouble = self._trouble, None
            raise _as_error(trouble)

    def _cause_of(self, error: BaseException) -> Exception | None:
        """What befell a worker, where that is why a transfer broke off; the worker may still be about to tell."""
        own = (WorkerError, MemoryBudgetError, comfy.model_management.InterruptProcessingException)
        if isinstance(error, own) or comfy.model_management.is_oom(error):
            return None
        self._troubled.wait(_CAUSE)
        return None if self._trouble is None else _as_error(self._trouble)


def _as_error(trouble: Message) -> Exception:
    kind = MemoryBudgetError if trouble.get("memory") else WorkerError
    return kind(trouble["worker"].sentence(trouble))


def _kind(device: torch.device) -> str:
    """The GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _name(device: torch.device, place: int) -> str:
    return str(device) if device.type == "cuda" else f"{device}:{place}"


def _environment(device: torch.device) -> dict[str, str]:
    """The worker's own GPU is the first that it sees; it sees the others, so that it can reach their memory."""
    if device.type != "cuda":
        return {}
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or "").split(",")
    indices = [str(index) for index in range(torch.cuda.device_count())] if visible == [""] else visible
    own = indices[device.index or 0]
    return {"CUDA_VISIBLE_DEVICES": ",".join([own, *(index for index in indices if index != own)])}
