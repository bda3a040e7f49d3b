"""Keeps measured numbers on disk, by what they depend on, so that a machine measures nothing twice."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VERSION = 3
log = logging.getLogger("lowbit.kernels")
# Nodes of one process share a file: reading, merging and replacing it is one act. Two processes may lose an entry to
# each other, which is measured anew.
_LOCK = threading.Lock()

Numbers = dict[str, float]


class MeasuredNumbers:
    """Positive numbers by name, for each thing that was measured in an environment. The file is replaced whole."""

    def __init__(self, folder: Path | None, file_name: str):
        """folder: where the file lies or will lie; None keeps the numbers in memory alone."""
        self.path = None if folder is None else Path(folder) / file_name
        self._entries: dict[str, dict[str, Numbers]] = self._read()

    def get(self, environment: str, measured: str) -> Numbers | None:
        """The numbers of one thing, or None when it was not measured in this environment."""
        return self._entries.get(environment, {}).get(measured)

    def put(self, environment: str, numbers: Mapping[str, Numbers]) -> None:
        """Keeps numbers, by what was measured, with those that other processes have written meanwhile."""
        with _LOCK:
            merged = self._read()
            for name, entries in self._entries.items():
                merged.setdefault(name, {}).update(entries)
            merged.setdefault(environment, {}).update(numbers)
            self._entries = merged
            self._write()

    def _read(self) -> dict[str, dict[str, Numbers]]:
        if self.path is None or not self.path.is_file():
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            return _validated(content)
        except (OSError, ValueError, RecursionError) as error:
            log.warning(
                "%s is not readable (%s); what it held is measured anew and the file is replaced.",
                self.path.name,
                error,
            )
            return {}

    def _write(self) -> None:
        if self.path is None:
            return
        content = json.dumps({"version": VERSION, "measured": self._entries}, indent=1, sort_keys=True)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name, suffix=".tmp")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(content)
                os.replace(temporary, self.path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            log.warning("What was measured was not kept (%s): the next start measures again.", error)


def _validated(content: Any) -> dict[str, dict[str, Numbers]]:
    """The numbers of a parsed file; raises ValueError when it is not one of ours."""
    if (
        not isinstance(content, dict)
        or content.get("version") != VERSION
        or not isinstance(content.get("measured"), dict)
    ):
        raise ValueError("not a file of measured numbers of this version")
    for things in content["measured"].values():
        if not isinstance(things, dict) or not all(isinstance(entry, dict) for entry in things.values()):
            raise ValueError("an environment's entry is damaged")
        for entry in things.values():
            if not all(isinstance(value, (int, float)) and 0 < value < 1e9 for value in entry.values()):
                raise ValueError("a number is damaged")
    return content["measured"]
