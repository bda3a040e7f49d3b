"""Loads the pack again and again, each time without one name of ComfyUI: for a process of its own, in ComfyUI's folder."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import inspect
import json
import logging
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

PACK = "lowbit_under_test"
KEPT = ("attention", "kernels", "memory", "text")
"""Folders of the pack that take nothing of ComfyUI: they are not loaded again. Nor is `ops` for a name that it does not take."""


class Log(logging.Handler):
    """Keeps the warnings of one loading."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def load(folder: Path, log: Log, kept: tuple[str, ...] = KEPT) -> list[str]:
    """Ids of the nodes that ComfyUI would list, from the pack as it is loaded now, but for the folders that are kept."""
    for name in [name for name in sys.modules if name.partition(".")[0] == PACK]:
        if name.split(".")[1:2] not in [[folder] for folder in kept]:
            del sys.modules[name]
    log.texts.clear()
    spec = importlib.util.spec_from_file_location(
        PACK, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[PACK] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        extension = asyncio.run(module.comfy_entrypoint())
        return [node.GET_SCHEMA().node_id for node in asyncio.run(extension.get_node_list())]
    except Exception as error:  # noqa: BLE001  # ComfyUI catches it too, and lists nothing
        log.texts.append(f"{type(error).__name__}: {error}")
        return []


def described(group: Any) -> dict[str, Any]:
    """A group's nodes, where they are, and what they need."""
    module = sys.modules[f"{PACK}.nodes.{group.module}"]
    return {
        "module": group.module,
        "nodes": [node.GET_SCHEMA().node_id for node in module.NODES],
        "needed": [name for names in group.names for name in names.NEEDED],
        "optional": [name for names in group.names for name in names.OPTIONAL],
    }


def owner_of(name: str) -> tuple[Any, str] | None:
    """The module or class that a name can be taken from, and the name's last part; None within a mere object."""
    *path, last = name.split(".")
    owner: Any = importlib.import_module(path[0])
    for count, part in enumerate(path[1:], 2):
        try:
            owner = importlib.import_module(".".join(path[:count]))
        except ImportError:
            owner = getattr(owner, part)
    is_holder = inspect.ismodule(owner) or (inspect.isclass(owner) and not issubclass(owner, Enum))
    return (owner, last) if is_holder and last in vars(owner) else None


@contextlib.contextmanager
def without(name: str, owner: Any, last: str) -> Iterator[None]:
    """As if ComfyUI had no such name."""
    value, module = vars(owner)[last], sys.modules.get(name)
    delattr(owner, last)
    if isinstance(module, ModuleType):
        sys.modules[name] = None  # type: ignore[assignment]  # makes its import fail
    try:
        yield
    finally:
        setattr(owner, last, value)
        if isinstance(module, ModuleType):
            sys.modules[name] = module


def expanded(names: list[str]) -> Iterator[str]:
    """The names, with those that end in a star as every name of that module that begins so."""
    for name in names:
        if name.endswith("*"):
            module, _, beginning = name[:-1].rpartition(".")
            yield from (
                f"{module}.{found}" for found in vars(importlib.import_module(module)) if found.startswith(beginning)
            )
        else:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
            yield name


def main(pack: str, wanted: str, out: str) -> None:
    sys.path.insert(0, ".")
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import nodes

    asyncio.run(nodes.init_builtin_extra_nodes())
    import server  # noqa: F401  # as in a running ComfyUI

    log = Log()
    logging.getLogger("lowbit").addHandler(log)
    found: dict[str, Any] = {"all": load(Path(pack), log), "said": list(log.texts), "without": {}, "fixed": []}
    found["groups"] = [described(group) for group in sys.modules[f"{PACK}.nodes"].GROUPS]
    names = json.loads(Path(wanted).read_text())
    kept = dict.fromkeys(expanded(names["others"]), (*KEPT, "ops"))
    for name, folders in (kept | dict.fromkeys(expanded(names["ops"]), KEPT)).items():
        place = owner_of(name) if "." in name else None
        if place is None:
            found["fixed"].append(name)
            continue
        with without(name, *place):
            left = load(Path(pack), log, folders)
        found["without"][name] = {"left": left, "said": list(log.texts)}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
