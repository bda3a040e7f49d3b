"""A weight that is where its input is, is taken as it is; any other is core's to bring, and dynamic VRAM's pages are let go."""

from __future__ import annotations

import contextlib

import pytest
import torch

from .files import load
from .test_patching import streamed


@pytest.fixture
def linear(host):
    return load(host, "int8").model.diffusion_model.blocks[0].self_attn.q


class Pages:
    """Stands in for comfy-aimdo: pages with a signature, and how often they are held."""

    def __init__(self, monkeypatch, resident, signature: int | None):
        self.signature, self.held = signature, 0
        monkeypatch.setattr(resident, "_fault", self._fault)
        monkeypatch.setattr(resident, "_unpin", self._unpin)
        monkeypatch.setattr(resident, "_same", lambda now, then: now is not None and now == then)

    def _fault(self, pages):
        assert pages is self
        # Without room, and a signature, nothing is held.
        self.held += self.signature is not None
        return self.signature

    def _unpin(self, pages):
        assert pages is self
        assert self.held > 0
        self.held -= 1


@pytest.fixture
def asked(host, monkeypatch):
    """The modules that core was asked to cast."""
    modules = []
    context = host.resident.comfy.ops.CastBiasWeightContext

    def cast(module, **options):
        modules.append(module)
        return context(module, **options)

    monkeypatch.setattr(host.resident.comfy.ops, "CastBiasWeightContext", cast)
    return modules


def paged(monkeypatch, host, linear, signature: int | None, loaded: int | None = 5) -> Pages:
    """`linear` with its weight in main memory (here: said to be on no device) and a copy in pages, loaded as `loaded`."""
    pages = Pages(monkeypatch, host.resident, signature)
    linear._v, linear._v_signature = pages, loaded
    linear._v_weight, linear._v_bias = linear.weight.clone(), linear.bias.detach().clone()
    return pages


def test_weights_on_the_inputs_device_are_taken_as_they_are(host, linear, asked):
    weight, bias, release = host.resident.weight_for(linear, torch.randn(3, 256))
    assert weight is linear.weight
    assert bias is linear.bias
    assert release is None
    bias = host.resident.weight_for(linear, torch.randn(3, 256).bfloat16())[1]
    assert bias.dtype == torch.bfloat16
    torch.testing.assert_close(bias, linear.bias.bfloat16())
    linear.bias = None
    assert host.resident.weight_for(linear, torch.randn(3, 256))[1] is None
    assert not asked


def test_a_streamed_weight_is_cores_to_bring(host, asked):
    module = streamed(load(host, "int8"))
    host.resident.weight_for(module, torch.empty(3, 256, device="meta"))
    assert asked == [module]


def test_pages_that_are_still_loaded_are_held_for_the_product_alone(host, linear, monkeypatch, asked):
    pages = paged(monkeypatch, host, linear, 5)
    x = torch.empty(3, 256, device="meta")
    weight, bias, release = host.resident.weight_for(linear, x)
    assert weight is linear._v_weight
    assert bias is linear._v_bias
    assert pages.held == 1
    release()
    assert pages.held == 0
    monkeypatch.setattr(host.operations, "quantized_linear", lambda *args, **options: pages.held / 0)
    with pytest.raises(ZeroDivisionError):
        linear(x)
    assert pages.held == 0
    assert not asked


def _given_by_core(host, monkeypatch, pages: Pages) -> list:
    """The modules that core has cast and not let go of; it gives the module itself and how often its pages are held."""
    given = []

    @contextlib.contextmanager
    def cast(module, **options):
        given.append(module)
        yield module, pages.held
        given.remove(module)

    monkeypatch.setattr(host.resident.comfy.ops, "CastBiasWeightContext", cast)
    return given


def _is_brought_by_core(host, linear, given):
    weight, held, release = host.resident.weight_for(linear, torch.empty(3, 256, device="meta"))
    assert weight is linear
    assert held == 0
    assert given == [linear]
    release()
    assert given == []


@pytest.mark.parametrize(("signature", "loaded"), [(6, 5), (None, 5), (5, None)])
def test_pages_that_left_are_cores_to_bring(host, linear, monkeypatch, signature, loaded):
    pages = paged(monkeypatch, host, linear, signature, loaded)
    given = _given_by_core(host, monkeypatch, pages)
    _is_brought_by_core(host, linear, given)


def test_pages_that_core_has_begun_to_fetch_are_left_to_it(host, linear, monkeypatch):
    pages = paged(monkeypatch, host, linear, 5)
    linear._prefetch = {"resident": True}
    given = _given_by_core(host, monkeypatch, pages)
    _is_brought_by_core(host, linear, given)
