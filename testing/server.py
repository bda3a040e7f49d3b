"""A headless ComfyUI in a process of its own, and a synchronous client for its HTTP and websocket API."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import http.client
import importlib.util
import json
import math
import os
import queue
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from . import comfyui

Graph = Mapping[str, Mapping[str, Any]]
Event = dict[str, Any]
SHIMS_NAME = "lowbit_tiny_shims"
SILENT_SECONDS = 180
WORK_SECONDS = 4  # an idle server takes one or two in that time
_FINAL = ("execution_success", "execution_error", "execution_interrupted")


class GraphRejectedError(RuntimeError):
    """The server answered HTTP 400: `node_errors` says what is wrong with which node."""

    def __init__(self, answer: Mapping[str, Any]):
        self.error = answer.get("error", {})
        self.node_errors = answer.get("node_errors", {})
        details = [
            f"{node['class_type']}: {error['message']}: {error['details']}"
            for node in self.node_errors.values()
            for error in node["errors"]
        ]
        super().__init__("; ".join(details) or str(self.error))


class GraphFailedError(RuntimeError):
    """A node raised: its class, the exception's type, its message and the traceback."""

    def __init__(self, data: Mapping[str, Any]):
        self.node_id = data["node_id"]
        self.node_type = data["node_type"]
        self.exception_type = data["exception_type"]
        self.exception_message = data["exception_message"].strip()
        self.traceback = "".join(data["traceback"])
        where = "".join(data["traceback"][-3:])
        super().__init__(f"{self.node_type}: {self.exception_type}: {self.exception_message}\n{where}")


class GraphInterruptedError(RuntimeError):
    """The prompt was interrupted before it was done."""


class ServerDiedError(RuntimeError):
    """The server process ended, or did not come up; the message holds the end of its log."""


@dataclass(frozen=True)
class Result:
    """One finished prompt: the outputs of its output nodes, every websocket event, and the seconds it took."""

    prompt_id: str
    outputs: dict[str, Any]
    events: list[Event] = field(repr=False)
    seconds: float = 0.0


def prepare_base(base: Path, models: Path | None = None) -> Path:
    """Makes a ComfyUI base directory with the pack and the shims as custom nodes, linked.

    models: a folder of models that several base directories share, linked; None makes one.
    """
    base.mkdir(parents=True, exist_ok=True)
    if models is not None:
        (base / "models").symlink_to(models, target_is_directory=True)
    for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (base / name).mkdir(exist_ok=True)
    for name, source in (("lowbit", comfyui.CHECKOUT), (SHIMS_NAME, comfyui.CHECKOUT / "testing" / "shims")):
        if not (base / "custom_nodes" / name).exists():
            (base / "custom_nodes" / name).symlink_to(source, target_is_directory=True)
    return base


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _no_frontend(base: Path) -> list[str]:
    """Arguments for a ComfyUI whose web pages are not installed: it ends without some, and nobody looks at them here."""
    if importlib.util.find_spec("comfyui_frontend_package") is not None:
        return []
    folder = base / "frontend"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.html").write_text("<html></html>")
    return ["--front-end-root", str(folder)]


class Progress:
    """Tells a process that hangs from one on a slow or busy machine, which no number of seconds does."""

    def __init__(self, pid: int):
        self._process = psutil.Process(pid)
        self.seen()

    def seen(self) -> None:
        """Something came of it: the silence begins anew."""
        self._since, self._worked = time.monotonic(), self._seconds_worked()

    def check(self, what: str) -> None:
        """Raises TimeoutError when `what` has for long shown no sign of life, nor taken the processor's time."""
        if self._seconds_worked() - self._worked > WORK_SECONDS:
            self.seen()
        elif time.monotonic() - self._since > SILENT_SECONDS:
            raise TimeoutError(f"{what} hangs: nothing came of it, and nothing was computed, for {SILENT_SECONDS} s")

    def _seconds_worked(self) -> float:
        try:
            times = self._process.cpu_times()
        except psutil.Error:
            return 0.0  # it has ended, which is the caller's to see
        return times.user + times.system


class Server:
    """A running headless ComfyUI. Use as a context manager, or call `close`; it is killed at exit in any case."""

    def __init__(
        self,
        base: Path,
        comfyui_path: Path,
        *,
        cpu: bool = True,
        only_shims: bool = False,
        dynamic_vram: bool = True,
        launcher: Iterable[str] = (),
        cache: Iterable[str] = ("--cache-lru", "8"),
        environment: Mapping[str, str] | None = None,
        name: str = "server",
    ):
        """Starts ComfyUI from `comfyui_path` on the base directory `base` and waits until it answers.

        only_shims: custom nodes are disabled but for the test shims: this is stock ComfyUI without the pack.
        dynamic_vram: False passes --disable-dynamic-vram. launcher: what Python runs that then runs main.py.
        cache: how node results are kept; empty for ComfyUI's own default, which watches main memory.
        Log: `base/{name}.log`. Raises ServerDiedError.
        """
        self.base = Path(base)
        self.log_path = self.base / f"{name}.log"
        self.address = f"127.0.0.1:{_free_port()}"
        self._client_id = uuid.uuid4().hex
        command = [sys.executable, *launcher, "main.py", "--port", self.address.rpartition(":")[2]]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-api-nodes", *cache, *(["--cpu"] if cpu else [])]
        command += [] if dynamic_vram else ["--disable-dynamic-vram"]
        command += _no_frontend(self.base)
        command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", SHIMS_NAME] if only_shims else []
        variables = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        if cpu:
            variables["OMP_NUM_THREADS"] = "1"  # tiny models: a second thread waits more than it works
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=comfyui_path,
                env=os.environ | variables | dict(environment or {}),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        atexit.register(self.close)
        self._queues: dict[str, queue.Queue[Event]] = {}
        self._lock = threading.Lock()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._listen()), name=f"{name}-client", daemon=True)
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the server and the client; safe to call twice."""
        atexit.unregister(self.close)
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self._thread.is_alive():
            self._thread.join(5)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def log(self) -> str:
        """Everything the server has written so far."""
        return self.log_path.read_text(errors="replace")

    def run(
        self, graph: Graph, timeout: float | None = None, on_event: Callable[[Event], None] | None = None
    ) -> Result:
        """Queues an API-form prompt and waits, as `wait` does. Raises GraphRejectedError, GraphFailedError, GraphInterruptedError, TimeoutError."""
        return self.wait(self.queue(graph), timeout, on_event)

    def queue(self, graph: Graph) -> str:
        """Queues a prompt; returns its id. Raises GraphRejectedError."""
        prompt_id = str(uuid.uuid4())
        with self._lock:
            self._queues[prompt_id] = queue.Queue()
        body = {"prompt": graph, "client_id": self._client_id, "prompt_id": prompt_id}
        status, answer = self._request("/prompt", body)
        if status != 200:
            raise GraphRejectedError(json.loads(answer))
        return prompt_id

    def wait(
        self, prompt_id: str, timeout: float | None = None, on_event: Callable[[Event], None] | None = None
    ) -> Result:
        """Waits for a queued prompt to end, calling `on_event` with each of its websocket messages.

        timeout: seconds in all; None: as long as it takes, while the server works or says anything.
        """
        started, events, progress = time.monotonic(), [], Progress(self.process.pid)
        while True:
            left = math.inf if timeout is None else timeout - (time.monotonic() - started)
            if left <= 0:
                raise TimeoutError(f"prompt {prompt_id} was not done after {timeout} s")
            try:
                event = self._queues[prompt_id].get(timeout=min(left, 1.0))
            except queue.Empty:
                if not self.alive:
                    raise ServerDiedError(self.log()[-4000:]) from None
                progress.check(f"prompt {prompt_id}")
                continue
            progress.seen()
            events.append(event)
            if on_event:
                on_event(event)
            if event["type"] in _FINAL:
                break
        if event["type"] == "execution_error":
            raise GraphFailedError(event["data"])
        if event["type"] == "execution_interrupted":
            raise GraphInterruptedError(prompt_id)
        outputs = self.history(prompt_id).get("outputs", {})
        return Result(prompt_id, outputs, events, time.monotonic() - started)

    def interrupt(self) -> None:
        """Interrupts the running prompt."""
        self._request("/interrupt", {})

    def free(self) -> None:
        """Asks the server to unload its models and drop its caches."""
        self._request("/free", {"unload_models": True, "free_memory": True})
        time.sleep(0.2)  # the server's worker does it when it next wakes, and nothing tells when it has

    def history(self, prompt_id: str) -> dict[str, Any]:
        """The history entry of a finished prompt; waits a little for it to be written."""
        for _ in range(1000):
            entry = self.get_json(f"/history/{prompt_id}").get(prompt_id)
            if entry:
                return entry
            time.sleep(0.02)
        raise TimeoutError(f"prompt {prompt_id} is not in the history")

    def object_info(self, node: str) -> dict[str, Any] | None:
        """The description of a node class, None when the server has no such node."""
        return self.get_json(f"/object_info/{node}").get(node)

    def get_json(self, path: str) -> Any:
        """GET `path`, decoded."""
        return json.loads(self._request(path)[1])

    def fetch(self, output: Mapping[str, str]) -> bytes:
        """The bytes of one file of a prompt's outputs (an entry with filename, subfolder and type)."""
        query = "&".join(f"{key}={output.get(key, '')}" for key in ("filename", "subfolder", "type"))
        return self._request(f"/view?{query}")[1]

    def _request(self, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, bytes]:
        """Status and content of a GET, or of a POST where there is a body."""
        with contextlib.closing(http.client.HTTPConnection(self.address)) as connection:
            if body is None:
                connection.request("GET", path)
            else:
                connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def _connect(self) -> None:
        progress = Progress(self.process.pid)
        while not self._listening.wait(0.1):
            if not self.alive:
                raise ServerDiedError(f"ComfyUI did not come up; the end of {self.log_path}:\n{self.log()[-4000:]}")
            progress.check("ComfyUI's start")
            if self._thread.is_alive():
                continue
            with contextlib.suppress(OSError):  # it does not answer yet
                status, _ = self._request("/system_stats")
                if status >= 500:
                    raise ServerDiedError(f"ComfyUI answers HTTP {status}:\n{self.log()[-4000:]}")
                self._thread.start()

    async def _listen(self) -> None:
        """Hands every message about a prompt to those who wait for it, until the server ends."""
        where = f"http://{self.address}/ws?clientId={self._client_id}"
        async with aiohttp.ClientSession() as session, session.ws_connect(where, max_msg_size=0) as socket:
            self._listening.set()
            async for message in socket:
                if message.type != aiohttp.WSMsgType.TEXT:
                    continue
                event = json.loads(message.data)
                with self._lock:
                    waiting = self._queues.get((event.get("data") or {}).get("prompt_id", ""))
                if waiting is not None:
                    waiting.put(event)
