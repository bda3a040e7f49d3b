"""A bundled prompt in a headless ComfyUI: run in a format, with what it made and how large its transformer was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lowbit.errors import LowbitError
from testing.graphs import Graph, Link, dump, node
from testing.server import GraphFailedError, Result, Server

FOLDER = Path(__file__).parent / "prompts"


@dataclass(frozen=True)
class BundledPrompt:
    """A prompt of demo/prompts on a server.

    Attributes:
        cache: where the server keeps quantized files.
        name: of the prompt's file.
        source: the file of its transformer.
        value: link to the tensor that it is run for.
    """

    server: Server
    cache: Path
    name: str
    source: Path
    value: Link

    def graph(self) -> Graph:
        """The prompt as its file has it."""
        return json.loads((FOLDER / f"{self.name}.json").read_text())

    def run(
        self,
        format: str,
        seed: int,
        where: str,
        progress: Callable[[dict[str, Any]], None] | None = None,
        *,
        text: str | None = None,
        file: str | None = None,
    ) -> tuple[torch.Tensor, Result]:
        """The tensor that it makes, and all its outputs; the size of the model goes to output/{where}.json.

        Raises:
            LowbitError: a node failed; the message is the node's.
        """
        graph = self.graph()
        graph["model"]["inputs"] |= {"format": format} | ({"unet_name": file} if file else {})
        graph["sample"]["inputs"]["seed"] = seed
        if text is not None:
            graph["positive"]["inputs"]["text"] = text
        graph["facts"] = node("TinyFacts", value=["model", 0], name=where, after=["sample", 0])
        try:
            result = self.server.run(dump(graph, where, value=self.value), on_event=progress)
        except GraphFailedError as error:
            raise LowbitError(error.exception_message) from None
        (tensor,) = load_file(self.server.base / "output" / where / "value.safetensors").values()
        return tensor, result

    def quantized_files(self) -> set[Path]:
        """Those that there are now."""
        return set(self.cache.glob("*.safetensors"))

    def sizes(self, before: set[Path], where: str) -> tuple[int, int]:
        """Bytes of the file that was loaded, one made since `before` or the source, and of what is loaded."""
        made = self.quantized_files() - before
        facts = json.loads((self.server.base / "output" / f"{where}.json").read_text())
        resident = facts["loaded" if torch.cuda.is_available() else "bytes"]
        return (made.pop() if made else self.source).stat().st_size, resident
