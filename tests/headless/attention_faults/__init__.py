"""A custom node for tests: gives an Attention (Lowbit) node's dispatcher backends that are wrong on purpose."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

FAULTS = ("none", "nan", "late nan", "raises", "missing", "wrong shape")


def _attend(q, k, v, mask, scale):
    heads = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(heads, dim=1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


class _Fault:
    def __init__(self, kind):
        self.kind, self.calls = kind, 0

    def __call__(self, q, k, v, mask, scale):
        self.calls += 1
        out = _attend(q, k, v, mask, scale)
        if self.kind == "nan" or (self.kind == "late nan" and self.calls > 10):
            return out * torch.nan
        if self.kind == "raises":
            raise RuntimeError("this backend always raises")
        if self.kind == "wrong shape":
            return out[:, :, 1:]
        return out


class _KnownTimes:
    """Timings that say of every shape: the faulty one is the fastest, ComfyUI's own the slowest."""

    def get(self, environment, call):
        return {"faulty": 1.0, "right": 2.0, "core": 3.0, "core_pytorch": 3.0}

    def put(self, environment, call, milliseconds):
        pass


class FaultyAttention:
    """Puts a backend named `faulty` first in the table of the model's attention node, before a right one."""

    CATEGORY, FUNCTION, RETURN_TYPES = "lowbit/test", "patch", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",), "fault": (FAULTS,), "seed": ("INT", {"min": 0, "max": 2**31})}}

    def patch(self, model, fault, seed):
        override = model.get_wrappers("outer_sample", "lowbit_attention")[-1].__self__.override
        dispatcher = override.dispatcher
        backends = sys.modules[type(dispatcher).__module__.replace(".dispatch", ".backends")]
        sdpa = backends.by_name()["sdpa"]
        faulty = replace(
            sdpa,
            name="faulty",
            error_class="fast",
            missing=lambda environment: "not installed" if fault == "missing" else None,
            install="pip install faulty",
            bind=lambda environment: _Fault(fault),
        )
        right = replace(sdpa, name="right", bind=lambda environment: _attend)
        dispatcher.planner.backends = {"faulty": faulty, "right": right}
        dispatcher.planner.timings = _KnownTimes()
        return (model,)


class TextMask:
    """Gives a conditioning a text mask that keeps all tokens but the first `dropped`."""

    CATEGORY, FUNCTION, RETURN_TYPES = "lowbit/test", "add", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"conditioning": ("CONDITIONING",), "dropped": ("INT", {"min": 0, "max": 99})}}

    def add(self, conditioning, dropped):
        out = []
        for text, extra in conditioning:
            mask = torch.ones(text.shape[:2], dtype=torch.int64)
            mask[:, :dropped] = 0
            out.append([text, extra | {"attention_mask": mask}])
        return (out,)


NODE_CLASS_MAPPINGS = {"TestFaultyAttention": FaultyAttention, "TestTextMask": TextMask}
