"""Writes sizes as people read them."""

from __future__ import annotations


def size_text(nbytes: float) -> str:
    """GiB from a tenth of one up, MiB below."""
    return f"{nbytes / 2**30:.2f} GiB" if abs(nbytes) >= 2**30 / 10 else f"{nbytes / 2**20:.1f} MiB"
