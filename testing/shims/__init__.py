"""Test-only nodes and detection shims for tiny checkpoints. Installed beside the pack by demo and tests, never shipped.

ComfyUI reads most dimensions off the tensors, but takes a few as constants of the one real model: Qwen-Image's heads
and text width, UMT5's and Qwen2.5-VL's whole configuration. Here those functions are wrapped so that the constants
follow the tensors too. A checkpoint of the real size goes through the wrappers unchanged.

The nodes make inputs that would need a real model (text conditioning of any width, CLIP vision output, encoded audio),
and write tensors and facts about a loaded model into the output folder, exact to the bit.
"""

from . import detection, quick, steps
from .nodes import NODE_CLASS_MAPPINGS

detection.install()
steps.install()
quick.install()

__all__ = ["NODE_CLASS_MAPPINGS"]
