"""Helpers of the tests of host/attention*: ComfyUI's modules, an override on backends of the tests' own, core's layouts."""

from __future__ import annotations

import time
import types

from lowbit.attention.candidates import Policy
from lowbit.attention.dispatch import Dispatcher
from lowbit.attention.schedule import Schedule

from ...attention import fakes


def load() -> types.SimpleNamespace:
    """The host modules; the fixture `core_modules` must have made ComfyUI's importable."""
    import comfy.ldm.modules.attention
    import comfy.model_patcher
    import comfy.patcher_extension

    from lowbit.host.attention import installing, override, routes, sampling_hooks

    return types.SimpleNamespace(
        attention=override,
        installing=installing,
        hooks=sampling_hooks,
        routes=routes.ROUTES,
        core=comfy.ldm.modules.attention,
        patcher=comfy.model_patcher.ModelPatcher,
        executor=comfy.patcher_extension.WrapperExecutor,
    )


def override(host, *backends, policy=None, schedule=None, previous=None):
    """An override whose table holds these backends alone, in this order."""
    backends = backends or (fakes.backend("sdpa_like"),)
    dispatcher = Dispatcher(
        policy or Policy("auto", "fast"),
        fakes.KnownTimes(*(b.name for b in backends)),
        backends=backends,
    )
    return host.attention.AttentionOverride(dispatcher, schedule or Schedule(), previous)


def counts(target):
    """Calls by backend."""
    return target.report()["calls_by_backend"]


def options(target, **more):
    """transformer_options with the override in them."""
    return {"optimized_attention_override": target, **more}


def layouts(q, k, v):
    """The two input layouts of core: heads first, and merged."""
    merged = [x.transpose(1, 2).flatten(2) for x in (q, k, v)]
    return {True: (q, k, v), False: merged}


def microseconds(call, rounds=15, calls=1000):
    """The fastest round's time per call, in the thread's own time and as on the machine the limits were set on."""
    times = []
    for _ in range(rounds):
        slowness = fakes.slowness(1)
        start = time.thread_time()
        for _ in range(calls):
            call()
        times.append((time.thread_time() - start) / calls * 1e6 / slowness)
    return min(times)
