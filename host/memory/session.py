"""The memory manager's view of the running prompt: its ledger and limit, the node at work, growth, and what it undoes."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from typing import Any

import comfy.model_management
from comfy_execution.progress import ProgressHandler, add_progress_handler
from comfy_execution.utils import get_executing_context

from ...memory.components import OTHER, SCRATCH
from ...memory.devices import CudaDevice, Device, HostDevice
from ...memory.growth import Sentinel
from ...memory.holders import BYTES, HOLDERS, Holder, Snapshot, find_growth, take_snapshot
from ...memory.ledger import Ledger, Sample
from ...memory.report import RunReport
from ...ops.scratch import release_scratch, scratch_nbytes
from .limit import VramLimit
from .loaded_models import component_bytes, outside_bytes, pinned_bytes, unnamed_bytes, weight_tensors
from .meter import Meter
from .prompt_end import at_prompt_end

log = logging.getLogger("lowbit.memory")

_HANDLER = "lowbit_memory"
_HOLDERS = (*HOLDERS, Holder("Lowbit's scratch", BYTES, scratch_nbytes, release_scratch))
# Main memory breathes: file caches, other threads, Python's own allocator.
_HOST_SLACK = 256 << 20


def _core_device() -> Device:
    device = comfy.model_management.get_torch_device()
    return CudaDevice(device, lambda: outside_bytes(device)) if device.type == "cuda" else HostDevice()


class Session(ProgressHandler):
    """ComfyUI tells it when each node starts and ends, and when the next prompt begins."""

    def __init__(self, device: Device | None = None):
        super().__init__(_HANDLER)
        device = device or _core_device()
        self.device = device
        self.ledger = Ledger(device, lambda: component_bytes(device.torch_device), pinned_bytes)
        self.limit = VramLimit(device, lambda: where()[0] == self.ledger.run.prompt)
        self.sentinel = Sentinel() if device.holds_models else Sentinel(slack=_HOST_SLACK)
        self.meter = Meter()
        self.registry: Any = None
        self.manager_node: str | None = None
        self._started: set[str] = set()
        self._reference: Snapshot | None = None
        self._ends_with_prompt = False

    def begin(self) -> Ledger:
        """The ledger of the running prompt; a new one when the prompt is a new one. Cheap to call at every turn."""
        prompt, node = where()
        # Threads of a multi-GPU run do not know their prompt. Whoever queues a prompt may give it the id of another.
        if prompt and (self.registry is None or prompt != self.ledger.run.prompt):
            self.ledger.begin(prompt)
            self.manager_node = None
            self._started = {node}
            add_progress_handler(self)
            self.observe("start", node=node)
        return self.ledger

    def manage(self, node_id: str | None, limit: int | None) -> None:
        """A managed model, text encoder or VAE is at work under the manager node `node_id` with this limit."""
        self.begin()
        self.manager_node = node_id
        self.limit.apply(limit)
        self._end_limit_with_prompt()
        self.ledger.run.limit = self.limit.nbytes
        if limit is not None and not self.device.holds_models:
            self.say("There is no GPU to limit: vram_limit_gib has no effect.")

    def _end_limit_with_prompt(self) -> None:
        if self.limit.nbytes is not None and not self._ends_with_prompt and where()[0]:
            self._ends_with_prompt = at_prompt_end(self._end_limit)

    def _end_limit(self) -> None:
        self._ends_with_prompt = False
        self.limit.remove()

    def observe(self, phase: str, step: int = 0, steps: int = 0, node: str | None = None) -> Sample:
        """Samples, and tells the browser."""
        node = where()[1] if node is None else node
        sample = self.ledger.sample(phase, node, step, steps)
        self.ledger.run.nodes.setdefault(node, self.node_class(node))
        self.meter.send(sample, self.ledger.run, self.manager_node, self.device.name, self.limit.nbytes)
        return sample

    def report(self) -> RunReport:
        """The running prompt's, with a reading of now."""
        ledger = self.begin()
        ledger.sample("report")
        return RunReport(ledger.run, self.device.name, self.device.total())

    def say(self, text: str) -> None:
        """A remark for the report, and for the log the first time."""
        if self.ledger.note(text):
            log.warning("%s", text)

    def passed(self, phase: Hashable, sample: Sample, thorough: bool = False) -> None:
        """Compares a phase with its earlier passings; on growth names the holder and frees what is safe to free.

        Args:
            phase: equal when the same use is to be expected.
            sample: the measurement there.
            thorough: whether there is time to walk all objects, which takes some tenths of a second.
        """
        unnamed = unnamed_bytes(self.device.torch_device)
        used = max(0, sample.components.get(OTHER, 0) - unnamed) + sample.components.get(SCRATCH, 0)
        growth = self.sentinel.mark(phase, used, max(0, sample.reserved - sample.allocated))
        kind = self.device.torch_device.type
        if thorough and self.sentinel.is_reference(phase):
            self._reference = take_snapshot(_HOLDERS, kind, weight_tensors)
        if growth is None:
            return
        before = self._reference
        found = [] if before is None else find_growth(_HOLDERS, before, kind, weights=weight_tensors)
        self._reference = take_snapshot(_HOLDERS, kind, weight_tensors)
        if growth.idle:
            self.device.clear()
        names = "; ".join(item.text for item in found) or "no known holder"
        self.say(
            f"{sample.phase}: {growth.nbytes / 2**20:,.0f} MiB more at passing {growth.times} than at passing "
            f"{growth.since}, {growth.idle / 2**20:,.0f} MiB of it idle ({names})"
        )

    def set_registry(self, registry: Any) -> None:
        """ComfyUI's progress registry, which knows the prompt's graph."""
        self.registry = registry

    def start_handler(self, node_id: str, state: Any, prompt_id: str) -> None:
        """A node starts."""
        self._started.add(node_id)
        self._at_node(node_id)

    def finish_handler(self, node_id: str, state: Any, prompt_id: str) -> None:
        """A node ends, or was not run because its outputs are there from an earlier prompt."""
        if node_id in self._started:
            self._at_node(node_id)

    def _at_node(self, node_id: str) -> None:
        """Samples; core calls this where an error would end its worker, and every prompt with it."""
        try:
            self.observe(self.node_class(node_id), node=node_id)
        except Exception as error:  # noqa: BLE001
            log.warning("Memory could not be measured at node %s: %s", node_id, error)

    def reset(self) -> None:
        """The next prompt begins: what this one changed in ComfyUI is as before."""
        self.limit.remove()
        self.registry = None

    def node_class(self, node_id: str) -> str:
        """Class of a node of the running graph."""
        try:
            return str(self.registry.dynprompt.get_node(node_id)["class_type"])
        except Exception:  # noqa: BLE001  # core's error for an unknown node differs between versions
            return "node"


def where() -> tuple[str, str]:
    """Ids of the running prompt and node; empty outside a prompt."""
    context = get_executing_context()
    return ("", "") if context is None else (context.prompt_id, context.node_id)


_SESSIONS: dict[str, Session] = {}
"""The process's one session, made when first asked for: GPU memory belongs to the process, not to a model."""


def session() -> Session:
    """The process's session."""
    if _HANDLER not in _SESSIONS:
        _SESSIONS[_HANDLER] = Session()
    return _SESSIONS[_HANDLER]
