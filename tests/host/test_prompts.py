"""Texts and latents that condition a run are on its device from its first step on, and nothing else of them changes."""

from __future__ import annotations

import types

import pytest
import torch


@pytest.fixture
def bring(core_modules):
    from lowbit.host.prompts import _bring

    return _bring


def test_tensors_move_for_both_prompts_and_what_is_no_tensor_stays(bring, monkeypatch):
    import comfy.conds

    from lowbit.host import prompts

    monkeypatch.setattr(prompts, "_LARGEST", 64)
    texts = [comfy.conds.CONDCrossAttn(torch.randn(1, 2, 4)) for _ in range(2)]
    large = comfy.conds.CONDNoiseShape(torch.randn(1, 4, 4, 4))
    listed, constant = comfy.conds.CONDList([torch.randn(2)]), comfy.conds.CONDConstant(torch.ones(3))
    first = {"c_crossattn": texts[0], "c_concat": large, "images": listed, "ref_audio": constant}
    bring([[{"model_conds": first}, {}], None, [{"model_conds": {"c_crossattn": texts[1]}}]], torch.device("meta"))
    assert [text.cond.device.type for text in texts] == ["meta", "meta"]
    assert large.cond.device.type == listed.cond[0].device.type == "cpu"
    assert constant.cond.device.type == "cpu", "ComfyUI compares it on the processor"


def test_prompts_are_batched_as_before_and_moved_once(core_modules):
    """Through ComfyUI's own batching, which refuses prompts on two devices."""
    import comfy.conds
    import comfy.samplers

    from lowbit.host.prompts import _calc_cond_batch

    texts = [comfy.conds.CONDCrossAttn(torch.randn(1, 3, 4)) for _ in range(2)]
    conds = [[{"model_conds": {"c_crossattn": text}}] for text in texts]
    seen = []
    x = torch.randn(1, 2, 2, 2)
    for _ in range(2):
        _calc_cond_batch(lambda *given: seen.append(given), "model", conds, x, "time", {})
    assert seen == [("model", conds, x, "time", {})] * 2
    moved = [text.cond for text in texts]
    joined = texts[0].concat([texts[1]])
    assert texts[0].can_concat(texts[1])
    assert torch.equal(joined, torch.cat(moved))


def test_models_of_the_loaders_have_it_once(core_modules):
    from comfy.patcher_extension import WrappersMP

    from lowbit.host.prompts import KEY, keep_prompts_near

    held: dict = {}
    patcher = types.SimpleNamespace(
        remove_wrappers_with_key=lambda kind, key: held.pop((kind, key), None),
        add_wrapper_with_key=lambda kind, key, wrapper: held.setdefault((kind, key), []).append(wrapper),
    )
    for _ in range(2):
        keep_prompts_near(patcher)
    assert len(held[WrappersMP.CALC_COND_BATCH, KEY]) == 1
