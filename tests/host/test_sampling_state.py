"""What a model call moves on is put back: a call made again gives what it gives when it is made once."""

from __future__ import annotations

import uuid

import pytest
import torch

FIRST, SECOND = uuid.UUID(int=1), uuid.UUID(int=2)


@pytest.fixture(scope="module")
def core(core_modules):
    from comfy_extras import nodes_easycache

    from lowbit.host.sampling_state import restorer

    nodes_easycache.restorer = restorer
    return nodes_easycache


def cached_run(core, fails_at: int | None) -> list[torch.Tensor]:
    """The outputs of five steps of two prompts behind core's EasyCache, where one step is made again after its second prompt."""
    holder = core.EasyCacheHolder(0.3, 0.0, 1.0, 1, False, output_channels=4)
    holder.start_t, holder.end_t = 1e9, 0.0
    draw = torch.Generator().manual_seed(3)
    latents = [torch.randn(1, 4, 8, 8, generator=draw) for _ in range(5)]

    def step(place: int) -> list[torch.Tensor]:
        holder.skip_current_step = False  # as its wrapper of a step's calls does
        outputs = []
        for prompt in (FIRST, SECOND):
            options = {"easycache": holder, "sigmas": torch.tensor([5.0 - place]), "uuids": [prompt]}
            x = latents[place].clone()
            outputs.append(core.easycache_forward_wrapper(lambda x, *_: x * 1.5 + 1, x, options))
        return outputs

    found = []
    for place in range(5):
        restore = core.restorer({"easycache": holder})
        if place == fails_at:
            step(place)
            restore()
        found += step(place)
    return found


@pytest.mark.parametrize("fails_at", range(5))
def test_core_s_easycache_does_not_compare_a_call_with_itself(core, fails_at):
    """It found no difference, and left the step out."""
    for again, once in zip(cached_run(core, fails_at), cached_run(core, None), strict=True):
        assert torch.equal(again, once)


def test_what_is_held_in_held_containers_is_put_back_and_tensors_are_not_copied(core):
    keys = torch.ones(3)
    caches = [{"k": keys, "end": 1, "seen": [1]}]
    options = {"ar_state": {"start_frame": 0, "kv_caches": caches, "crossattn_caches": None}, "sigmas": keys}
    restore = core.restorer(options)
    caches[0].update(end=4, extra=True)
    caches[0]["seen"].append(2)
    caches.append({})
    options["ar_state"]["start_frame"] = 3
    restore()
    assert options["ar_state"] == {"start_frame": 0, "kv_caches": caches, "crossattn_caches": None}
    assert caches == [{"k": keys, "end": 1, "seen": [1]}]
    assert caches[0]["k"] is keys
    core.restorer(None)()
