"""The memory manager's view of the running prompt: its ledger, what node is at work, and what is undone when it ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management
from comfy_execution.progress import ProgressHandler, add_progress_handler
from comfy_execution.utils import get_executing_context

from ..memory.devices import CudaDevice, Device, HostDevice
from ..memory.ledger import Ledger
from .memory_components import component_bytes, outside_bytes, pinned_bytes

log = logging.getLogger("lowbit.memory")

_HANDLER = "lowbit_memory"


def _core_device() -> Device:
    device = comfy.model_management.get_torch_device()
    return CudaDevice(device, outside_bytes) if device.type == "cuda" else HostDevice()


class Session(ProgressHandler):
    """ComfyUI tells it when each node starts and ends, and when the next prompt begins."""

    def __init__(self, device: Device | None = None):
        super().__init__(_HANDLER)
        self.ledger = Ledger(device or _core_device(), component_bytes, pinned_bytes)
        self.registry: Any = None
        self._undo: dict[str, Callable[[], None]] = {}

    def begin(self) -> Ledger:
        """The ledger of the running prompt; a new one when the prompt is a new one. Cheap to call at every turn."""
        prompt, _ = where()
        if prompt != self.ledger.run.prompt:
            self.ledger.begin(prompt)
            add_progress_handler(self)
        return self.ledger

    def set_registry(self, registry: Any) -> None:
        """ComfyUI's progress registry, which knows the prompt's graph."""
        self.registry = registry

    def at_end(self, name: str, undo: Callable[[], None]) -> None:
        """Has `undo` called when this prompt is over; one for each name."""
        self._undo[name] = undo

    def start_handler(self, node_id: str, state: Any, prompt_id: str) -> None:
        """A node starts."""
        self.ledger.sample(self.node_class(node_id), node_id)

    def finish_handler(self, node_id: str, state: Any, prompt_id: str) -> None:
        """A node ends."""
        self.ledger.sample(self.node_class(node_id), node_id)

    def reset(self) -> None:
        """The next prompt begins: everything that this one changed in ComfyUI is as before."""
        undo, self._undo = self._undo, {}
        for restore in undo.values():
            restore()

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
