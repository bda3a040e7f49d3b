"""What tests on a CPU need not wait for, where they ask for it: the disk, and a megapixel of every picture that is edited.

A file that a test writes need not survive a power cut. Qwen-Image-Edit's text node enlarges a picture to a megapixel, however
small it is, encodes it and attends to it: here to a sixteenth of one.
"""

import math
import os
import sys
import types

QUICK = "LOWBIT_QUICK_TESTS"
"""The environment variable that asks for it."""

EDITS = ("TextEncodeQwenImageEdit", "TextEncodeQwenImageEditPlus")
SIDE = 4
"""By how much an edited picture's sides are shorter."""


def install() -> None:
    """Takes the waiting out of `os.fsync` and the scale out of core's nodes."""
    if not os.environ.get(QUICK):
        return
    os.fsync = lambda file: None
    core = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})  # none of it without a server
    for name in EDITS:
        node = core.get(name)
        if node is not None:
            node.execute.__func__.__globals__["math"] = types.SimpleNamespace(
                sqrt=lambda value: math.sqrt(value) / SIDE
            )
