"""The session of the memory manager: one ledger a prompt, and nothing in it that could end a prompt or the server."""

from __future__ import annotations

import types

import pytest
import torch

from lowbit.memory.components import DIFFUSION_MODEL

from .support import GIB, FakePatcher, device, host, loaded

__all__ = ["device", "host", "loaded"]


@pytest.fixture
def prompt(host):
    """Runs as node 3 of a prompt of this id, in a registry of its own, as core starts each prompt."""
    from comfy_execution.progress import reset_progress_state
    from comfy_execution.utils import CurrentNodeContext

    def run(prompt_id):
        graph = types.SimpleNamespace(get_node=lambda node_id: {"class_type": "KSampler"})
        reset_progress_state(prompt_id, graph)
        return CurrentNodeContext(prompt_id, "3")

    yield run
    reset_progress_state("", types.SimpleNamespace())


def test_a_prompt_with_the_id_of_the_last_one_is_a_prompt_of_its_own(host, device, prompt):
    """Whoever queues a prompt over the API may choose its id."""
    current = host.session.session()
    whole = host.core.get_free_memory
    with prompt("mine"):
        current.manage("7", GIB)
        first = current.ledger.run
    with prompt("mine"):
        assert host.core.get_free_memory is whole
        current.manage("7", GIB)
        assert current.ledger.run is not first
        assert host.core.get_free_memory is not whole
    with prompt("another"):
        assert host.core.get_free_memory is whole, "nobody told the session that the second one was over"


def test_what_cannot_be_measured_ends_no_prompt(host, device, prompt, monkeypatch, caplog):
    """Core tells of the end of a node outside of its error handling: what is raised there ends the server's worker."""
    from comfy_execution.progress import get_progress_state

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with prompt("a"):
        host.session.session().manage("7", None)
        monkeypatch.setattr(device, "read", broken)
        get_progress_state().start_progress("4")
        get_progress_state().finish_progress("4")
    assert "illegal memory access" in caplog.text


def test_a_node_that_came_from_the_cache_has_no_peak(host, device, prompt):
    from comfy_execution.progress import get_progress_state

    from lowbit.memory.report import RunReport

    current = host.session.session()
    with prompt("a"):
        current.manage("7", None)
        device.allocated = GIB
        get_progress_state().finish_progress("cached")
        get_progress_state().start_progress("run")
        get_progress_state().finish_progress("run")
        get_progress_state().finish_progress("3")
        report = RunReport(current.ledger.run, device.name, device.total())
    assert [entry["id"] for entry in report.data["nodes"]] == ["3", "run"]


def test_growth_names_the_passings_it_lies_between(host, device):
    current = host.session.session()
    for index in range(6):
        device.allocated = (100 + 40 * max(0, index - 2)) << 20
        current.passed("a phase", current.ledger.sample("sampled"))
    (fourth, fifth, sixth) = current.ledger.run.notes
    assert fourth.startswith("sampled: 40 MiB more at passing 4 than at passing 3")
    assert fifth.startswith("sampled: 40 MiB more at passing 5 than at passing 4")
    assert sixth.startswith("sampled: 40 MiB more at passing 6 than at passing 5")


def test_a_model_without_a_name_here_is_no_growth(host, device, monkeypatch):
    """A ControlNet or a CLIP vision model that is loaded from one prompt to the next is not what creeps up."""
    current = host.session.session()
    control = FakePatcher(torch.nn.Sequential(), device.torch_device)
    monkeypatch.setattr(host.core, "current_loaded_models", [])
    for index in range(5):
        if index == 3:
            host.core.current_loaded_models.append(types.SimpleNamespace(model=control))
        device.allocated = (100 << 20) + (control.loaded if index >= 3 else 0)
        current.passed("a phase", current.ledger.sample("sampled"))
    assert current.ledger.run.notes == []
    device.allocated += 40 << 20
    current.passed("a phase", current.ledger.sample("sampled"))
    assert current.ledger.run.notes[0].startswith("sampled: 40 MiB more at passing 6")


def test_weights_in_dynamic_vrams_pages_are_known_as_weights(host, loaded):
    layer = torch.nn.Linear(8, 8)
    layer._v_weight, layer._v_bias = torch.zeros(3), None
    loaded[DIFFUSION_MODEL].model = torch.nn.Sequential(layer)
    assert {id(tensor) for tensor in host.components.weight_tensors()} == {
        id(tensor) for tensor in (layer.weight, layer.bias, layer._v_weight)
    }
