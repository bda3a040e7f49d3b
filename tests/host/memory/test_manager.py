"""The memory manager's hooks into ComfyUI's own functions: what they answer, what they leave, and that they are undone."""

from __future__ import annotations

import ctypes
import gc
import types
from dataclasses import replace

import pytest
import torch

from lowbit.errors import MemoryBudgetError
from lowbit.memory.components import AUDIO_ENCODER, DIFFUSION_MODEL, MODEL_PATCH, SCRATCH, TEXT_ENCODER, VAE
from lowbit.memory.policies import ALWAYS, NEVER, UNDER_PRESSURE, Settings

from ...memory.fakes import Clock
from .support import GIB, FakePatcher, device, host, loaded, model_of

__all__ = ["device", "host", "loaded"]


# --- the limit


def test_cores_accounting_sees_the_smaller_card_and_then_the_whole_one_again(host, device):
    free, total = host.core.get_free_memory, host.core.get_total_memory
    device.allocated = 3 * GIB
    limit = host.limit.VramLimit(device)
    limit.apply(8 * GIB)
    cpu = device.torch_device
    assert host.core.get_free_memory(cpu) == 5 * GIB
    assert host.core.get_free_memory(cpu, torch_free_too=True)[0] == 5 * GIB
    assert host.core.get_total_memory(cpu) == 8 * GIB
    device.allocated = 9 * GIB
    assert host.core.get_free_memory(cpu) == 0
    limit.remove()
    assert (host.core.get_free_memory, host.core.get_total_memory) == (free, total)


def test_the_limit_is_no_wider_than_the_machine(host, device):
    limit = host.limit.VramLimit(device)
    limit.apply(1 << 60)
    cpu = device.torch_device
    assert host.core.get_free_memory(cpu) < 1 << 50
    assert host.core.get_total_memory(cpu) < 1 << 50
    limit.remove()


def test_other_devices_are_not_limited(host, device):
    device.torch_device = torch.device("cuda", 0)
    limit = host.limit.VramLimit(device)
    limit._cap_allocator = lambda: None
    limit.apply(GIB // 1024)
    assert host.core.get_free_memory(torch.device("cpu")) > GIB // 1024
    assert host.core.get_total_memory(torch.device("cpu")) > GIB // 1024
    asked = [
        None,
        torch.device("cuda"),
        torch.device("cuda", 0),
        "cuda:0",
        torch.device("cuda", 1),
        torch.device("cpu"),
    ]
    assert [limit._applies_to(device) for device in asked] == [True, True, True, True, False, False]
    limit.remove()


def test_a_hook_that_others_have_wrapped_stays_and_does_nothing(host, device, monkeypatch):
    limit = host.limit.VramLimit(device)
    monkeypatch.setattr(host.core, "get_free_memory", host.core.get_free_memory)
    limit.apply(GIB)
    ours = host.core.get_free_memory

    def wrapper(*args, **kwargs):
        return ours(*args, **kwargs)

    host.core.get_free_memory = wrapper
    limit.remove()
    assert host.core.get_free_memory is wrapper
    assert host.core.get_free_memory(torch.device("cpu")) != GIB


def test_another_limit_takes_the_place_of_the_first(host, device):
    original = host.core.get_free_memory
    limit = host.limit.VramLimit(device)
    for nbytes in (2 * GIB, 4 * GIB, 4 * GIB, GIB):
        limit.apply(nbytes)
        assert host.core.get_free_memory(device.torch_device) == nbytes
    limit.apply(None)
    assert host.core.get_free_memory is original


def test_who_asks_from_outside_the_prompt_sees_the_whole_card(host, device, monkeypatch):
    """As ComfyUI's display of the system does, from a thread of its own."""
    from comfy_execution.utils import CurrentNodeContext

    monkeypatch.setattr(host.session, "add_progress_handler", lambda handler: None)
    current = host.session.session()
    cpu = device.torch_device
    whole = host.core.get_total_memory(cpu)
    with CurrentNodeContext("prompt", "3"):
        current.manage("7", GIB)
        assert host.core.get_total_memory(cpu) == host.core.get_free_memory(cpu) == GIB
    assert host.core.get_total_memory(cpu) == whole
    assert host.core.get_free_memory(cpu) > GIB
    with CurrentNodeContext("another prompt", "3"):
        assert host.core.get_total_memory(cpu) == whole


def test_without_a_gpu_nothing_is_limited(host, device):
    device.holds_models = False
    original = host.core.get_free_memory
    limit = host.limit.VramLimit(device)
    limit.apply(1)
    assert host.core.get_free_memory is original
    assert limit.nbytes is None


def test_what_is_loaded_beyond_a_new_limit_leaves_at_once(host, device, loaded):
    """PyTorch's allocator then refuses 16 bytes, before any room is made."""
    host.release.manage_prompt("7", 20 * GIB)
    assert all(patcher.loaded for patcher in loaded.values())
    host.release.manage_prompt("7", 3 * GIB)
    assert not any(patcher.loaded for patcher in loaded.values())
    (entry,) = host.session.session().ledger.run.releases
    assert "limit" in entry.reason


def test_a_model_that_samples_now_stays_under_a_new_limit(host, device, loaded):
    """A VAE that encodes in mid-step takes over too; the model of that step would not be loaded again before its call."""
    loaded[DIFFUSION_MODEL].model.current_patcher = loaded[DIFFUSION_MODEL]
    host.release.manage_prompt("7", 3 * GIB)
    assert [name for name, patcher in loaded.items() if patcher.loaded] == [DIFFUSION_MODEL]


def test_idle_memory_beyond_a_new_limit_goes_and_models_stay(host, device, loaded, monkeypatch):
    held = [8 * GIB]
    monkeypatch.setattr(device, "clear", lambda: held.pop())
    monkeypatch.setattr(device, "read", lambda: host.Reading(10 * GIB, 10 * GIB + sum(held), 0, GIB))
    host.release.manage_prompt("7", 12 * GIB)
    assert all(patcher.loaded for patcher in loaded.values())
    assert not held


def test_budget_and_room(host, device):
    device.allocated, device.reserved = 4 * GIB, 6 * GIB
    limit = host.limit.VramLimit(device)
    assert limit.budget == 24 * GIB
    assert limit.room == 20 * GIB
    limit.apply(10 * GIB)
    assert limit.budget == 10 * GIB
    assert limit.room == 6 * GIB
    limit.remove()


def test_the_headroom_is_read_from_the_library_that_core_uses(host):
    if not hasattr(host.limit.comfy_aimdo.control, "init"):
        pytest.skip("need comfy-aimdo")
    from pathlib import Path

    import comfy_aimdo.control

    files = list(Path(comfy_aimdo.control.__file__).parent.glob("aimdo.so"))
    if not files:
        pytest.skip("need comfy-aimdo's library for this system")
    library = ctypes.CDLL(str(files[0]))
    before = host.limit._headroom(library)
    library.set_simple_vram_headroom.argtypes = [ctypes.c_int64]
    library.set_simple_vram_headroom(5 * GIB)
    assert host.limit._headroom(library) == 5 * GIB
    library.set_simple_vram_headroom(before)
    assert host.limit._headroom(types.SimpleNamespace()) is None


# --- releasing


def test_components_are_known_by_their_class(host, loaded):
    for name, patcher in loaded.items():
        assert host.components.component_of(patcher.model) == name
    assert host.components.component_of(object()) is None
    assert host.components.component_bytes(torch.device("cpu")) == dict.fromkeys(loaded, 2 * GIB) | {SCRATCH: 0}


def test_a_model_on_another_device_is_not_on_this_one(host, loaded, device):
    """A text encoder that was put on the CPU counts as loaded there; a model on a second GPU as loaded there."""
    loaded[TEXT_ENCODER].load_device = torch.device("cuda", 1)
    assert host.components.component_bytes(device.torch_device)[TEXT_ENCODER] == 0
    sample = host.session.session().ledger.sample("a test")
    assert sample.components[TEXT_ENCODER] == 0
    assert sample.components[DIFFUSION_MODEL] == 2 * GIB


def test_a_release_moves_weights_keeps_pins_and_measures_what_it_freed(host, loaded):
    released = host.release.release([TEXT_ENCODER, VAE])
    assert set(released.names) == {TEXT_ENCODER, VAE}
    assert released.weights == released.freed == 4 * GIB
    assert {name for name, patcher in loaded.items() if patcher.loaded == 0} == {TEXT_ENCODER, VAE}
    assert all(patcher.pinned == 2 * GIB for patcher in loaded.values())
    assert "4,096 MiB freed" in released.text
    entries = host.session.session().ledger.run.releases
    assert [entry.freed for entry in entries] == [4 * GIB]
    assert host.release.release([TEXT_ENCODER, VAE]).text.startswith("Nothing to release")
    assert len(entries) == 1, "a release of nothing is no entry"


def test_what_a_run_needs_stays(host, loaded):
    host.release.release([DIFFUSION_MODEL, MODEL_PATCH], keep=[loaded[MODEL_PATCH]])
    assert loaded[DIFFUSION_MODEL].loaded == 0
    assert loaded[MODEL_PATCH].loaded == 2 * GIB


def test_a_model_that_samples_now_stays_until_its_run_has_failed(host, loaded):
    """Core's Dual Model CFG Guider loads one model, then the other, and runs them in turns; neither is loaded again."""
    other = loaded[DIFFUSION_MODEL]
    other.model.current_patcher = other
    main = FakePatcher(model_of(host, DIFFUSION_MODEL), other.load_device, 30 * GIB)
    host.room.release_for(ALWAYS, main, GIB, what="the second model")
    host.room.release_all_but([main], "a step")
    assert loaded[TEXT_ENCODER].loaded == 0
    assert other.loaded == 2 * GIB
    demand = host.preflight.sampling_demand
    other.model.parameters = lambda: iter(())
    other.model.latent_format = None
    assert demand(other, (1, 16, 21, 60, 104), 0).fixed == 0, "it can stream, so it need not be there"

    def call():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(MemoryBudgetError):
        host.room.again_after_oom(call, lambda: "room was made", "a step")
    assert other.loaded == 0


def test_a_model_elsewhere_or_with_no_place_to_go_is_left_alone(host, loaded, device):
    device.torch_device = torch.device("cuda", 0)
    loaded[TEXT_ENCODER].load_device = torch.device("cpu")
    loaded[DIFFUSION_MODEL].load_device = loaded[DIFFUSION_MODEL].offload_device = torch.device("cuda", 0)
    loaded[VAE].load_device = torch.device("cuda", 0)
    host.release.release([TEXT_ENCODER, DIFFUSION_MODEL, VAE])
    assert (loaded[TEXT_ENCODER].loaded, loaded[DIFFUSION_MODEL].loaded, loaded[VAE].loaded) == (2 * GIB, 2 * GIB, 0)


@pytest.mark.parametrize(
    ("when", "working", "others_leave"),
    [(NEVER, 100 * GIB, False), (ALWAYS, 0, True), (UNDER_PRESSURE, GIB, False), (UNDER_PRESSURE, 15 * GIB, True)],
)
def test_way_is_made_by_policy(host, loaded, when, working, others_leave):
    host.room.release_for(when, loaded[DIFFUSION_MODEL], working, [loaded[MODEL_PATCH]], "a test")
    assert loaded[DIFFUSION_MODEL].loaded == loaded[MODEL_PATCH].loaded == 2 * GIB
    assert {loaded[name].loaded == 0 for name in (TEXT_ENCODER, VAE, AUDIO_ENCODER)} == {others_leave}


@pytest.mark.parametrize("when", [ALWAYS, UNDER_PRESSURE])
def test_no_way_is_made_for_what_runs_elsewhere(host, loaded, when):
    """A text encoder on the CPU needs nothing of the GPU, however large it is."""
    encoder = loaded[TEXT_ENCODER]
    encoder.load_device, encoder.loaded, encoder.size = torch.device("cuda", 1), 0, 100 * GIB
    assert host.room.release_for(when, encoder, 0, what="the text encoder") is None
    assert loaded[DIFFUSION_MODEL].loaded == 2 * GIB


def test_what_runs_elsewhere_is_not_refused_for_this_device(host, loaded):
    model = loaded[DIFFUSION_MODEL]
    model.model = types.SimpleNamespace(parameters=lambda: iter(()), latent_format=None)
    with pytest.raises(MemoryBudgetError, match="needs at least"):
        host.preflight.check_sampling(model, (1, 16, 21, 60, 104), 100 * GIB)
    model.load_device = torch.device("cuda", 1)
    host.preflight.check_sampling(model, (1, 16, 21, 60, 104), 100 * GIB)


def test_a_model_with_no_place_to_go_is_not_said_to_stream(host, loaded, device):
    """With --gpu-only or --highvram the legacy patcher would move weights from the GPU to the GPU and count them as gone."""
    model = loaded[DIFFUSION_MODEL]
    device.torch_device = model.load_device = model.offload_device = torch.device("cuda", 0)
    model.dynamic = False
    assert host.room.release_part(model, GIB) == 0
    assert model.calls == []
    model.offload_device = torch.device("cpu")
    assert host.room.release_part(model, GIB) == GIB


def test_weights_that_are_not_there_yet_count_as_pressure(host, loaded):
    model = loaded[DIFFUSION_MODEL]
    model.loaded, model.size = 0, 15 * GIB
    host.room.release_for(UNDER_PRESSURE, model, GIB)
    assert loaded[TEXT_ENCODER].loaded == 2 * GIB
    model.size = 16 * GIB
    host.room.release_for(UNDER_PRESSURE, model, GIB)
    assert loaded[TEXT_ENCODER].loaded == 0


def test_what_dynamic_vram_holds_outside_pytorch_is_counted_once(host, loaded, monkeypatch):
    gpu = torch.device("cuda", 0)
    pages = types.SimpleNamespace(loaded_size=lambda: 3 * GIB)
    for name in (DIFFUSION_MODEL, TEXT_ENCODER):
        loaded[name].model.dynamic_vbars = {gpu: pages, torch.device("cuda", 1): pages}
    buffers = {index: types.SimpleNamespace(device=index, size=lambda: GIB) for index in (0, 1)}
    monkeypatch.setattr(host.core, "STREAM_AIMDO_CAST_BUFFERS", buffers)
    assert host.components.outside_bytes(gpu) == 0, "dynamic VRAM is off"
    monkeypatch.setattr(host.core_memory, "aimdo_enabled", True)
    assert host.components.outside_bytes(gpu) == 7 * GIB


# --- after running out


def test_a_call_is_done_again_once_and_the_first_errors_tensors_are_gone_by_then(host, device):
    alive = []

    class Big:
        pass

    def call():
        big = Big()
        if not alive:
            alive.append("first")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")
        return sum(type(item) is Big for item in gc.get_objects()), big

    def make_room():
        assert not any(type(item) is Big for item in gc.get_objects()), (
            "the failed call's frame still holds its tensors"
        )
        return "room was made"

    count, _ = host.room.again_after_oom(call, make_room, "a test")
    assert count == 1
    assert host.session.session().ledger.run.notes == [
        "Out of memory in a test. It was done again after this: room was made."
    ]


def test_a_second_failure_is_one_sentence_a_person_can_act_on(host, device):
    def call():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")

    with pytest.raises(MemoryBudgetError) as failed:
        host.room.again_after_oom(call, lambda: "room was made", "a test")
    text = str(failed.value)
    assert "a test ran out of memory twice" in text
    assert "24.00 GiB" in text
    assert "Tried to allocate 2 GiB." in text
    assert "more lines" not in text
    assert device.cleared == 1


@pytest.mark.parametrize(
    "error",
    [
        ValueError("shape"),
        KeyboardInterrupt(),
        MemoryBudgetError("refused"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        MemoryError(),
    ],
    ids=repr,
)
def test_other_errors_pass_and_make_no_room(host, device, error):
    def call():
        raise error

    with pytest.raises(type(error)):
        host.room.again_after_oom(call, lambda: pytest.fail("no room is needed"), "a test")


# --- the meter


class Server:
    """ComfyUI's server as the meter sees it."""

    def __init__(self, client_id="a", sockets=("a",)):
        self.client_id, self.sockets, self.sent, self.texts = client_id, dict.fromkeys(sockets), [], []

    def send_sync(self, event, data, sid):
        self.sent.append((event, data, sid))

    def send_progress_text(self, text, node_id, sid):
        self.texts.append((text, node_id, sid))


def a_sample(host, device):
    return host.session.session().ledger.sample("sampling", "3", 2, 20), host.session.session().ledger.run


def test_the_meter_sends_four_times_a_second_and_no_more(host, device):
    server, clock = Server(), Clock()
    meter = host.meter.Meter(lambda: server, clock)
    sample, run = a_sample(host, device)
    for index in range(100):
        clock.now = index / 50
        meter.send(sample, run, "7", "cuda:0", None)
    assert len(server.sent) == 8
    assert {(event, sid) for event, _, sid in server.sent} == {("lowbit.memory", "a")}
    assert server.texts[0][1:] == ("7", "a")
    assert server.texts[0][0].startswith("sampling 2/20, 0.00 GiB now")


def test_the_meter_does_not_stay_at_a_step_when_sampling_is_over(host, device):
    server, clock = Server(), Clock()
    meter = host.meter.Meter(lambda: server, clock)
    sample, run = a_sample(host, device)
    for phase in ("sampling", "sampling", "sampled"):
        clock.now += 0.01
        meter.send(replace(sample, phase=phase), run, "7", "cuda:0", None)
    assert [data["phase"] for _, data, _ in server.sent] == ["sampling", "sampled"]


@pytest.mark.parametrize(
    ("server", "node"),
    [
        (None, "7"),
        (Server(client_id=None), "7"),
        (Server(sockets=()), "7"),
        (Server(sockets=("b",)), "7"),
        (Server(), None),
    ],
)
def test_the_meter_is_silent_while_nobody_listens(host, device, server, node):
    sample, run = a_sample(host, device)
    host.meter.Meter(lambda: server).send(sample, run, node, "cuda:0", None)
    assert server is None or server.sent == []


def test_pixels_are_estimated_in_the_shape_that_core_gives_them(host):
    vae = type("V", (host.decoding.ManagedVAE,), {})()
    pixels = torch.zeros(5, 64, 32, 3)
    for latent_dim, not_video, shape in [
        (2, False, (5, 3, 64, 32)),
        (3, False, (1, 3, 5, 64, 32)),
        (3, True, (5, 3, 1, 64, 32)),
    ]:
        vae.latent_dim, vae.not_video = latent_dim, not_video
        assert vae._pixel_shape(pixels) == shape
    assert vae._pixel_shape(pixels[None]) == (1, 3, 5, 64, 32)


@pytest.mark.parametrize(("needed", "whole"), [(13, True), (21, True), (23, False)])
def test_a_decode_is_tiled_only_if_it_does_not_fit_with_all_else_gone(host, device, loaded, needed, whole):
    """Of 24 GiB other models hold 8 and the VAE 2. Core moves the others out of the way by itself, whatever the policy."""
    vae = type("V", (host.decoding.ManagedVAE,), {"spacial_compression_decode": lambda self: 8})()
    vae.latent_dim, vae.vae_dtype, vae.device, vae.patcher = 3, torch.bfloat16, device.torch_device, loaded[VAE]
    vae.memory_used_decode = lambda shape, dtype: needed * GIB * shape[2] * shape[3] * shape[4] / (21 * 60 * 104)
    assert (vae._tiles(torch.zeros(1, 16, 21, 60, 104)) is None) is whole


@pytest.mark.parametrize(
    ("where", "gpu", "said"), [("cpu", "cuda", True), ("cuda", "cuda", False), ("cpu", "cpu", False)]
)
def test_a_vae_that_was_put_on_the_cpu_is_told_of(host, device, where, gpu, said):
    device.torch_device = torch.device(gpu, 0) if gpu == "cuda" else torch.device(gpu)
    vae = type("V", (host.decoding.ManagedVAE,), {})()
    vae.device, vae.patcher = torch.device(where), FakePatcher(torch.nn.Module(), torch.device(where))
    vae._lowbit_memory = (Settings("speed"), "7")
    vae._begin("decode", 0)
    assert any("on the CPU" in note for note in host.session.session().ledger.run.notes) is said


def test_a_managed_class_is_made_once_and_is_still_cores(host):
    class Core:
        pass

    first = host.encoding.class_in_front(Core, host.encoding.ManagedClip)
    assert issubclass(first, Core)
    assert host.encoding.class_in_front(Core, host.encoding.ManagedClip) is first
    assert host.encoding.class_in_front(first, host.encoding.ManagedClip) is first
