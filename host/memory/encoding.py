"""A text encoder under the memory manager: releases what is in its way, and encodes again after running out."""

from __future__ import annotations

from typing import Any

from ...memory.policies import Settings
from ..in_front import class_in_front
from .pages import part_limit
from .release import manage_prompt
from .room import alone_after_oom, release_for
from .session import session

_WORKING_SHARE = 1 / 8
"""Part of a limit that a prompt's activations have to themselves while a text encoder runs."""


class ManagedClip:
    """Mixin over core's CLIP: only loading and encoding differ."""

    patcher: Any
    _lowbit_memory: tuple[Settings, str | None]

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        """A clone is managed too; core makes its clones anew."""
        return manage_clip(super().clone(*args, **kwargs), *self._lowbit_memory)  # type: ignore[misc]

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        """Core's load, after a release if it needs the room."""
        settings, node_id = self._lowbit_memory
        manage_prompt(node_id, settings.limit_bytes)
        release_for(settings.row.release_before_sampling, self.patcher, 0, what="the text encoder")
        session().observe("load")
        out = super().load_model(*args, **kwargs)  # type: ignore[misc]
        part_limit(self.patcher, 1.0, _WORKING_SHARE * session().limit.budget)
        session().observe("encode")
        return out

    def encode_from_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Core's encode, once more with all other models off the GPU if it runs out of memory."""
        encode = super().encode_from_tokens  # type: ignore[misc]
        out = alone_after_oom(lambda: encode(*args, **kwargs), self.patcher, "the text encoder")
        session().observe("encoded")
        return out


def manage_clip(clip: Any, settings: Settings, node_id: str | None) -> Any:
    """Make this CLIP (a clone of the user's) a managed one."""
    clip.__class__ = class_in_front(type(clip), ManagedClip)
    clip._lowbit_memory = (settings, node_id)
    return clip
