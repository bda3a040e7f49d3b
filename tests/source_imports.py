"""Reads the project's imports from its source: which module imports which, and which names of other packages it uses."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from testing.comfyui import CHECKOUT

Module = tuple[str, ...]
"""A module's dotted name below the checkout, split at its dots; () is the pack itself."""

PACK = "lowbit"
LEFT_OUT = ("tests",)


def modules(root: Path = CHECKOUT) -> dict[Module, Path]:
    """Every module of the checkout but the tests, with its file."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in LEFT_OUT and not any(part.startswith(".") for part in parts):
            found[parts[:-1] if parts[-1] == "__init__" else parts] = path
    return found


def parse(path: Path) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(module: Module, path: Path) -> Iterator[tuple[bool, Module]]:
    """What a file imports, wherever it says so: whether relatively, and the whole name of a module or of a thing in one."""
    package = module if path.name == "__init__.py" else module[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((False, tuple(alias.name.split("."))) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            yield from ((node.level > 0, (*base, alias.name)) for alias in node.names)


def inner_imports(known: Mapping[Module, Path]) -> dict[Module, set[Module]]:
    """Which of these modules imports which of them; a name that a package defines counts as the package."""
    arrows = {}
    for module, path in known.items():
        arrows[module] = set()
        for relative, name in imported(module, path):
            target = name[1:] if not relative and name[0] == PACK else name
            while target and target not in known:
                target = target[:-1]
            if target or relative or name[0] == PACK:
                arrows[module].add(target)
    return arrows


def reached(start: Module, arrows: Mapping[Module, set[Module]]) -> set[Module]:
    """Every module that an import of `start` brings in, with itself."""
    seen, waiting = set(), [start]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += arrows.get(module, ())
    return seen


def names_of(path: Path, packages: Collection[str]) -> set[str]:
    """Full names of what a file takes from these packages: imported, as attributes, or written out in a string.

    `getattr(module, f"attention_{name}")` gives `module.attention_*`.
    """
    tree = parse(path)
    known: dict[str, str] = {}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in packages:
                    found.add(alias.name)
                    known[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
        elif isinstance(node, ast.ImportFrom) and not node.level and str(node.module).split(".")[0] in packages:
            for alias in node.names:
                found.add(f"{node.module}.{alias.name}")
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_dotted(node.value, packages):
            found.add(node.value)
    for node in ast.walk(tree):
        name = _full_name(node, known)
        if name is not None:
            found.add(name)
    return found


def _is_dotted(text: str, packages: Collection[str]) -> bool:
    first, *others = text.split(".")
    return first in packages and bool(others) and all(part.isidentifier() for part in others)


def _full_name(node: ast.AST, known: Mapping[str, str]) -> str | None:
    """The name of an attribute of something imported, however deep; None for any other expression."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        inner = _full_name(node.value, known)
        return None if inner is None else f"{inner}.{node.attr}"
    if isinstance(node, ast.Call) and node.args:
        function, first = ast.unparse(node.func), node.args[0]
        if function == "importlib.import_module" and isinstance(first, ast.Constant):
            return str(first.value)
        if function == "getattr" and isinstance(node.args[1], (ast.Constant, ast.JoinedStr)):
            inner, attribute = _full_name(first, known), node.args[1]
            text = attribute if isinstance(attribute, ast.Constant) else attribute.values[0]
            beginning = f"{text.value}*" if attribute is not text else text.value
            return None if inner is None else f"{inner}.{beginning}"
    return None
