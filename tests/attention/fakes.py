"""Backends for tests: right ones, wrong ones, and a recording stand-in for sageattn3. None of them is a product backend."""

from __future__ import annotations

import time

import torch

from lowbit.attention.backends import CORE, CORE_EXACT, Backend
from lowbit.attention.candidates import Policy
from lowbit.attention.dispatch import Dispatcher
from lowbit.attention.environment import Environment

CPU = Environment("cpu")
HOPPER = Environment("cuda", (9, 0), "a Hopper GPU", (13, 0), "580.1")


def attend(q, k, v, mask=None, scale=None):
    """Attention in the inputs' dtype, (batch, heads, length, head_dim)."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def reference(q, k, v, mask=None, scale=None):
    """Attention in float64, written out, with the heads merged: (batch, length, heads * head_dim)."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = q.double() @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        while mask.ndim < 4:
            mask = mask.unsqueeze(0 if mask.ndim == 2 else 1)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Recorder:
    """Wraps a kernel and keeps what it was called with."""

    def __init__(self, kernel=attend):
        self.kernel = kernel
        self.calls = []

    def __call__(self, q, k, v, mask, scale):
        self.calls.append((q, k, v, mask, scale))
        return self.kernel(q, k, v, mask, scale)


def backend(name="fake", kernel=attend, error_class="exact", missing=None, **limits):
    """A backend that runs anywhere."""
    return Backend(
        name=name,
        title=name,
        error_class=error_class,
        missing=lambda environment: missing,
        bind=lambda environment: kernel,
        install=f"pip install {name}",
        **{"dtypes": (torch.float32, torch.bfloat16, torch.float16), "masks": ("keys", "bool", "float"), **limits},
    )


class KnownTimes:
    """Timings that say of every shape: these names, the fastest first, and ComfyUI's own last."""

    def __init__(self, *names):
        self.times = {name: float(number + 1) for number, name in enumerate((*names, CORE, CORE_EXACT))}

    def get(self, environment, call):
        return dict(self.times)

    def put(self, environment, call, milliseconds):
        raise AssertionError("nothing is timed where all is known")


def qkv(batch=1, heads=2, q_len=9, kv_len=11, head_dim=16, kv_heads=None, seed=0, dtype=torch.float32):
    """Gaussian q, k, v shaped (batch, heads, length, head_dim)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, q_len), (kv_heads or heads, kv_len), (kv_heads or heads, kv_len))
    return [torch.randn(batch, n, length, head_dim, generator=generator).to(dtype) for n, length in shapes]


def noisy(q, k, v, mask, scale):
    """An attention that errs by a fifth."""
    out = attend(q, k, v, mask, scale)
    return out + 0.2 * torch.randn_like(out) * out.std()


class Core:
    """Stands for ComfyUI's own attention, the last resort: counts its calls."""

    def __init__(self, q, k, v, mask=None, scale=None, heads_first=False):
        self.arguments = (q, k, v, mask, scale)
        self.heads_first = heads_first
        self.calls = 0
        self.masks_dropped = 0

    def __call__(self, drop_mask):
        self.calls += 1
        self.masks_dropped += drop_mask
        q, k, v, mask, scale = self.arguments
        while mask is not None and mask.ndim < 4:
            mask = mask.unsqueeze(0 if mask.ndim == 2 else 1)
        out = attend(q, k, v, None if drop_mask else mask, scale)
        return out if self.heads_first else out.transpose(1, 2).flatten(2)


def dispatcher(*backends, policy=None, **options):
    """One that times nothing: the first of `backends` is the fastest."""
    timings = KnownTimes(*(backend.name for backend in backends))
    return Dispatcher(policy or Policy("auto", "fast"), timings, backends=backends, **options)


def report(target):
    """What a dispatcher has counted, as plain data."""
    return target.report.as_dict(target.settings(torch.device("cpu")))


def counts(target):
    """Calls by backend."""
    return report(target)["calls_by_backend"]


NOMINAL_LOOP_SECONDS = 0.001
"""What `_loop` takes on the machine that the 15 microseconds were set on."""


def _loop() -> float:
    start = time.thread_time()
    table = {}
    for number in range(20000):
        table["key"] = number
        table.get("key")
    return time.thread_time() - start


def slowness(rounds: int = 10) -> float:
    """How many times slower than that machine this one runs Python now; at least 1, so that limits only widen."""
    return max(1.0, min(_loop() for _ in range(rounds)) / NOMINAL_LOOP_SECONDS)
