"""Keeps measured timings on disk, by GPU, driver and package versions, so that a shape is timed once per machine."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

FILE_NAME = "attention_timings.json"
VERSION = 2
log = logging.getLogger("lowbit.attention")
# Nodes of one process share the file: reading, merging and replacing it is one act. Two processes may lose an entry to
# each other, which is timed anew.
_LOCK = threading.Lock()


class TimingCache:
    """Milliseconds per backend, by environment fingerprint and call. The file is replaced whole."""

    def __init__(self, folder: Path | None):
        """folder: where `attention_timings.json` lies or will lie; None keeps timings in memory alone."""
        self.path = None if folder is None else Path(folder) / FILE_NAME
        self._entries: dict[str, dict[str, dict[str, float]]] = self._read()

    def get(self, environment: str, call: str) -> dict[str, float] | None:
        """Backend name to milliseconds, or None when this call was not timed in this environment."""
        return self._entries.get(environment, {}).get(call)

    def put(self, environment: str, call: str, milliseconds: dict[str, float]) -> None:
        """Keeps the timings of a call, merged with what other processes have written meanwhile."""
        with _LOCK:
            merged = self._read()
            for name, entries in self._entries.items():
                merged.setdefault(name, {}).update(entries)
            merged.setdefault(environment, {})[call] = milliseconds
            self._entries = merged
            self._write()

    def _read(self) -> dict[str, dict[str, dict[str, float]]]:
        if self.path is None or not self.path.is_file():
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            return _validated(content)
        except (OSError, ValueError, RecursionError) as error:
            log.warning(
                "%s is not readable (%s); attention is timed anew and the file is replaced.", self.path.name, error
            )
            return {}

    def _write(self) -> None:
        if self.path is None:
            return
        content = json.dumps({"version": VERSION, "timings": self._entries}, indent=1, sort_keys=True)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=FILE_NAME, suffix=".tmp")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(content)
                os.replace(temporary, self.path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            log.warning("Attention timings were not kept (%s): the next start measures again.", error)


def _validated(content: Any) -> dict[str, dict[str, dict[str, float]]]:
    """The timings of a parsed file; raises ValueError when it is not one of ours."""
    if (
        not isinstance(content, dict)
        or content.get("version") != VERSION
        or not isinstance(content.get("timings"), dict)
    ):
        raise ValueError("not a timing file of this version")
    for calls in content["timings"].values():
        if not isinstance(calls, dict) or not all(isinstance(entry, dict) for entry in calls.values()):
            raise ValueError("an environment's entry is damaged")
        for entry in calls.values():
            if not all(isinstance(value, (int, float)) and 0 < value < 1e9 for value in entry.values()):
                raise ValueError("a timing is damaged")
    return content["timings"]
