"""Fixtures for tests in a real, headless ComfyUI that is started once per session.

HOWTO (every test below tests/headless/ is marked `headless` and left out where there is no ComfyUI):

    from testing import graphs
    from testing.measure import relative_error

    def test_something(bench):
        graph = graphs.wan_t2v(
            graphs.load_diffusion_model("wan_t2v.safetensors", format="int8"),    # core's UNETLoader without format
            graphs.conditioning_random(width=256),                                # or conditioning_from_text(...)
        ) | graphs.decode()
        out = bench.sample(graph)               # {"latent": (1, 16, 2, 8, 8), "image": (5, 64, 64, 3)}, float32
        reference = bench.sample(same_graph_with_core_loader)
        assert relative_error(out["latent"], reference["latent"]) < 0.02

- `bench`: the running ComfyUI with the pack (session scope). `bench.sample(graph)` runs a graph and returns node
  `sample`'s latent and, when the graph has it, node `images`' images. `bench.tensors(graph, a=["node", 0], ...)` returns
  any LATENT, IMAGE or CONDITIONING. `bench.facts(graph, ["model", 0])` returns the bytes a loaded model holds and each
  Linear's class and format. `bench.server` (testing/server.py) has run, queue, wait, interrupt, history, object_info, log;
  it raises GraphRejectedError (HTTP 400), GraphFailedError (a node's error, with `.exception_message`), GraphInterruptedError.
- `stock`: a second ComfyUI on the same base directory without the pack, started when first asked for.
- `memory`: a server with the pack and faults for the memory tests (memory_bench.py).
- `models`: the models folder of both, with every file of `tiny.FILES` in it. Write more files there under fresh names
  (`bench.models / "diffusion_models" / "mine.safetensors"`), and take them away again.
- Graphs: testing/graphs.py (node ids: model, clip, positive, negative, latent, sample, vae, images, patch, lora).
- A graph whose every node and input was seen before is answered from ComfyUI's cache: give a fresh `seed` or call
  `bench.server.free()` when the loading itself is the point.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from testing import graphs, tiny
from testing.server import Server, prepare_base

from .memory_bench import FAULTS, MemoryBench

# MKL otherwise rounds by the alignment of its operands, so that the same weights from another file give other bits.
REPRODUCIBLE = {"MKL_CBWR": "COMPATIBLE"}


class Bench:
    """A running server, with helpers that give a graph's results back as tensors."""

    def __init__(self, server: Server):
        self.server = server
        self._names = itertools.count()

    @property
    def base(self) -> Path:
        return self.server.base

    @property
    def models(self) -> Path:
        return self.server.base / "models"

    @property
    def output(self) -> Path:
        return self.server.base / "output"

    def tensors(
        self, graph: graphs.Graph, timeout: float | None = None, **values: graphs.Link
    ) -> dict[str, torch.Tensor]:
        """Runs the graph and returns the LATENT, IMAGE or CONDITIONING at each link (its first tensor)."""
        name = f"{self.server.log_path.stem}-{next(self._names)}"
        self.server.run(graphs.dump(graph, name, **values), timeout)
        return {key: next(iter(load_file(self.output / name / f"{key}.safetensors").values())) for key in values}

    def sample(self, graph: graphs.Graph, timeout: float | None = None) -> dict[str, torch.Tensor]:
        """Runs the graph; `latent` is node sample's, `image` node images' when the graph has one."""
        values = {"latent": ["sample", 0]} | ({"image": ["images", 0]} if "images" in graph else {})
        return self.tensors(graph, timeout, **values)

    def facts(self, graph: graphs.Graph, value: graphs.Link, after: graphs.Link | None = None) -> dict[str, Any]:
        """Runs the graph; bytes held by the MODEL, CLIP, VAE or MODEL_PATCH at `value`, and what each Linear is."""
        name = f"{self.server.log_path.stem}-facts-{next(self._names)}"
        inputs = {"value": value, "name": name} | ({"after": after} if after else {})
        self.server.run(graph | {"facts": graphs.node("TinyFacts", **inputs)})
        return json.loads((self.output / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ComfyUI base directory with the pack, the shims and the tiny checkpoints."""
    folder = prepare_base(tmp_path_factory.mktemp("comfyui"))
    tiny.write_all(folder / "models")
    return folder


@pytest.fixture(scope="session")
def models(base: Path) -> Path:
    """The models folder of the servers."""
    return base / "models"


@pytest.fixture(scope="session")
def bench(base: Path, comfyui_path: Path) -> Iterator[Bench]:
    """The running ComfyUI with the pack."""
    with Server(base, comfyui_path, environment=REPRODUCIBLE, name="pack") as server:
        yield Bench(server)


@pytest.fixture(scope="session")
def stock(base: Path, comfyui_path: Path) -> Iterator[Bench]:
    """A running ComfyUI without the pack, on the same base directory."""
    with Server(base, comfyui_path, only_shims=True, environment=REPRODUCIBLE, name="stock") as server:
        yield Bench(server)


@contextlib.contextmanager
def faulty_server(base: Path, models: Path, comfyui_path: Path, faults: Path) -> Iterator[Server]:
    """A server with the pack and a folder of faults. On a CPU there is no dynamic VRAM to switch off: tests/gpu has both."""
    prepare_base(base, models=models)
    (base / "custom_nodes" / faults.name).symlink_to(faults, target_is_directory=True)
    environment = {"LOWBIT_CACHE_DIR": str(base / "cache")}
    with Server(base, comfyui_path, environment=environment, name=faults.name) as server:
        yield server


@pytest.fixture(scope="session")
def memory(models: Path, comfyui_path: Path, tmp_path_factory) -> Iterator[MemoryBench]:
    """A server with the memory manager's faults."""
    with faulty_server(tmp_path_factory.mktemp("memory"), models, comfyui_path, FAULTS) as server:
        yield MemoryBench(server)
