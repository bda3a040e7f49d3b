"""After an out-of-memory error in mid-run under dynamic VRAM: core's own patcher and streaming, with aimdo's calls stood in for."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch

from lowbit.memory.policies import NEVER

from .support import GIB, device, host

__all__ = ["device", "host"]

PAGE = 32 << 20


class Pages:
    """A VBAR whose pages are numbers."""

    def __init__(self, size, index):
        self.loaded, self.marks = 4 * PAGE, []

    def prioritize(self):
        self.watermark = None

    def alloc(self, nbytes):
        return (self, 0, nbytes)

    def loaded_size(self):
        return self.loaded

    def free_memory(self, nbytes):
        freed = min(self.loaded, -(-int(nbytes) // PAGE) * PAGE)
        self.loaded -= freed
        return freed

    def set_watermark(self, nbytes):
        self.marks.append(nbytes)


class HostBuffer:
    size = 0

    def __init__(self, *sizes):
        pass

    def truncate(self, offset, do_unregister=True):
        pass


@pytest.fixture
def streaming(host, device, monkeypatch):
    """Core's dynamic patcher of a model with a streamed Linear and parameters that core moves as a whole; its `GPU` is meta."""
    import comfy.model_patcher
    import comfy.ops
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar

    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", HostBuffer)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "ModelVBAR", Pages, raising=False)
    unpinned = []
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbar_unpin", unpinned.append)

    class Model(host.base_model):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.first = comfy.ops.manual_cast.Linear(256, 256, dtype=torch.bfloat16)
            self.second = comfy.ops.manual_cast.Linear(256, 256, dtype=torch.bfloat16)
            self.norm = torch.nn.LayerNorm(256)
            self.register_buffer("frequencies", torch.ones(64))
            self.model_loaded_weight_memory, self.current_weight_patches_uuid = 0, None

    device.torch_device = torch.device("meta")
    model = Model()
    patcher = comfy.model_patcher.ModelPatcherDynamic(model, torch.device("meta"), torch.device("cpu"))
    patcher.load(torch.device("meta"))
    monkeypatch.setattr(host.core, "current_loaded_models", [types.SimpleNamespace(model=patcher)])
    yield types.SimpleNamespace(patcher=patcher, model=model, unpinned=unpinned)
    patcher.model.dynamic_patchers.clear()


@pytest.mark.parametrize("nbytes", [PAGE, 8 * GIB], ids=["less than is there", "more than is there"])
def test_a_running_model_releases_pages_and_nothing_that_it_needs_where_it_is(host, streaming, nbytes):
    """After a real out-of-memory error the driver has taken the pages already: asking for more must not take the rest."""
    model = streaming.model
    assert model.norm.weight.device.type == model.frequencies.device.type == "meta"
    freed = host.room.release_part(streaming.patcher, nbytes)
    assert freed == min(nbytes, 4 * PAGE)
    assert model.norm.weight.device.type == model.frequencies.device.type == "meta"
    assert streaming.patcher.loaded_size() == 4 * PAGE - freed + model.model_loaded_weight_memory


def test_without_dynamic_vram_too_what_cannot_stream_stays_where_it_runs(host, streaming, monkeypatch):
    """Core moves the smallest layers first, among them those that do not cast their weights for each call."""
    import comfy.model_patcher

    model = type(streaming.model)()
    model.model_lowvram, model.lowvram_patch_counter, model.model_offload_buffer_memory = False, 0, 0
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("meta"), torch.device("cpu"))
    monkeypatch.setattr(patcher, "pin_weight_to_device", lambda key: None)
    moved = []
    monkeypatch.setattr(torch.nn.Linear, "to", lambda self, device: moved.append(device))
    model.norm.to("meta")
    for module in (model.first, model.second, model.norm):
        module.comfy_patched_weights = True
    model.model_loaded_weight_memory = patcher.model_size()
    assert host.room.release_part(patcher, 200 << 10) > 128 << 10
    assert moved, "the layers that can stream have left"
    assert model.norm.weight.device.type == model.norm.bias.device.type == "meta"


def test_a_transfer_that_was_cut_short_is_forgotten(host, streaming):
    first, second = streaming.model.first, streaming.model.second
    first._v, second._v = ("pages", 0, 1), ("pages", 1, 1)
    first._prefetch = {"signature": (1,), "resident": False}
    second._prefetch = {"signature": None, "resident": False}
    first._v_signature, second._v_signature = (1,), None
    host.room.release_all_but([streaming.patcher], "a test")
    assert not hasattr(first, "_prefetch")
    assert not hasattr(second, "_prefetch")
    assert streaming.unpinned == [("pages", 0, 1)], "a page that was faulted in is pinned once, and let go once"
    assert first._v_signature is None, "what was only half done to the page is done again"


def test_what_an_unmanaged_prompt_left_half_done_is_forgotten_before_the_model_runs_managed(host, streaming):
    """Core leaves it there after an out-of-memory error, whoever ran the model; without leftovers nothing is sent twice."""
    first, second = streaming.model.first, streaming.model.second
    first._v, second._v = ("pages", 0, 1), ("pages", 1, 1)
    first._v_signature, second._v_signature = (1,), (1,)
    host.room.release_for(NEVER, streaming.patcher, 0)
    assert first._v_signature == second._v_signature == (1,)
    second._prefetch = {"signature": None, "resident": False}
    host.room.release_for(NEVER, streaming.patcher, 0)
    assert not hasattr(second, "_prefetch")
    assert second._v_signature is None


class CastBuffer:
    """The one buffer that all streamed weights go through."""

    def __init__(self):
        self.bytes = torch.zeros(1 << 20, dtype=torch.uint8)

    def size(self):
        return len(self.bytes)

    def get(self, nbytes, offset):
        return self.bytes[offset : offset + nbytes]


def test_a_layer_whose_cast_ran_out_of_memory_gets_its_own_weights_when_the_step_is_done_again(
    host, streaming, monkeypatch
):
    """Core keeps what it began for a layer and takes it for ready; by then other layers have been through the buffer."""
    import comfy.ops
    import comfy_aimdo.model_vbar
    import comfy_aimdo.torch
    from comfy.cli_args import args

    buffer = CastBuffer()
    stream = types.SimpleNamespace(as_context=lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(args, "disable_pinned_memory", True)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbar_fault", lambda allocation: None)
    monkeypatch.setattr(comfy_aimdo.torch, "aimdo_to_tensor", lambda allocation, device: allocation)
    monkeypatch.setattr(host.core, "get_offload_stream", lambda device: stream)
    monkeypatch.setattr(host.core, "get_aimdo_cast_buffer", lambda stream, device: buffer)
    monkeypatch.setattr(host.core, "sync_stream", lambda device, stream: None)
    monkeypatch.setattr(host.core, "is_device_cpu", lambda device: False)
    elsewhere = torch.device("cpu", 0)

    def weight_of(layer):
        cast = comfy.ops.cast_bias_weight(layer, None, torch.float32, elsewhere, torch.float32, offloadable=True)
        return cast[0].clone()

    first, second = streaming.model.first, streaming.model.second
    for layer in (first, second):
        layer._v, layer._v_signature = ("pages", 0, 1), None
        torch.nn.init.normal_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    assert weight_of(first).equal(first.weight.float())

    def runs_out(weight):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    first.weight_function = [runs_out]
    with pytest.raises(torch.OutOfMemoryError):
        weight_of(first)
    first.weight_function = []
    host.room.release_all_but([streaming.patcher], "a test")
    for _ in range(2):
        assert weight_of(second).equal(second.weight.float())
        assert weight_of(first).equal(first.weight.float())


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("VRAM grow failed: 283115520 bytes"),
        RuntimeError("Fault failed: 2"),
    ],
    ids=str,
)
def test_dynamic_vrams_own_errors_are_out_of_memory_errors_too(host, device, error):
    """While weights stream, most of what is asked of the driver is asked by comfy-aimdo, which raises errors of its own."""
    calls = []

    def call():
        calls.append(len(calls))
        if len(calls) == 1:
            raise error
        return "done"

    assert host.room.again_after_oom(call, lambda: "room was made", "a test") == "done"
    assert "Out of memory in a test" in host.session.session().ledger.run.notes[0]
