"""The rows' limits in one sentence each, and how packages are called: with recording stand-ins where the GPU is missing."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import sys
import types

import pytest
import torch

from lowbit.attention import backends, calls, environment
from lowbit.attention.backends import BACKENDS, ERROR_LIMITS, AttentionCall
from lowbit.attention.environment import Environment

from . import fakes

SAGE_KERNEL = "qk_int8_sv_f8_accum_f32_fuse_v_scale_attn_inst_buf"
TABLE = {backend.name: backend for backend in BACKENDS}
CALL = AttentionCall("cuda", torch.bfloat16, 1, 24, 24, 4608, 4608, 128, 128)
GPUS = {
    cc: Environment("cuda", cc, "a GPU", (13, 0)) for cc in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
}


def call(**changes):
    head_dim = {"value_dim": changes["head_dim"]} if "head_dim" in changes else {}
    return dataclasses.replace(CALL, **head_dim, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("lowbit_int8_fp8", {"head_dim": 256}, "head dim 256; it takes up to 128"),
        ("lowbit_int8_fp8", {"mask": "bool"}, "it takes no mask but one of keys"),
        ("lowbit_int8_fp16", {"mask": "float"}, "it takes no mask but one of keys"),
        ("lowbit_int8_fp16", {"dtype": torch.float32}, "it takes float16 or bfloat16, not float32"),
        ("sageattn_3_fp4", {"head_dim": 96}, "head dim 96; it takes 64 and 128"),
        ("sageattn_3_fp4", {"mask": "float"}, "it takes no mask"),
        ("sageattn_3_fp4", {"scale": 0.5}, "it takes no softmax scale of its own"),
        ("sageattn_3_fp4", {"kv_heads": 8}, "24 query heads over 8 key heads"),
        ("sageattn_3_fp8", {"head_dim": 256}, "head dim 256; it takes up to 128"),
        ("sageattn_3_fp8", {"mask": "bool"}, "it takes no mask"),
        ("sageattn_3_fp8", {"dtype": torch.float32}, "it takes float16 or bfloat16, not float32"),
        ("sageattn_3_fp8", {"batch": 8, "q_len": 100_000}, "its offsets are 32-bit"),
        ("sageattn", {"mask": "bool"}, "it takes no mask"),
        ("sageattn_fp16", {"kv_len": 32}, "32 keys; it needs 128"),
        ("comfy_kitchen_int8", {"head_dim": 320}, "head dim 320; it takes up to 256"),
        ("flash", {"mask": "float"}, "it takes no mask"),
        ("flash", {"kv_heads": 7}, "24 query heads over 7 key heads"),
        ("cudnn", {"q_len": 0}, "an empty input"),
        ("cudnn", {"dtype": torch.float32}, "not float32"),
    ],
)
def test_a_limit_says_itself(name, changes, says):
    assert says in str(TABLE[name].why_not(call(**changes), GPUS[9, 0]))


@pytest.mark.parametrize(
    "name", ["lowbit_int8_fp8", "lowbit_int8_fp16", "sageattn_3_fp8", "comfy_kitchen_int8", "flash", "cudnn", "sdpa"]
)
def test_the_usual_call_is_taken(name):
    assert TABLE[name].why_not(CALL, GPUS[9, 0]) is None
    assert TABLE[name].why_not(call(kv_heads=8), GPUS[9, 0]) is None


def test_fp8_values_are_kept_from_lengths_where_they_are_known_to_be_noisy():
    long = call(q_len=170_000, kv_len=170_000)
    assert "error grows past 160000 on cc 12.0" in str(TABLE["sageattn_3_fp8"].why_not(long, GPUS[12, 0]))
    assert TABLE["sageattn_3_fp8"].why_not(long, GPUS[9, 0]) is None


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("lowbit_int8_fp8", {(8, 9), (9, 0), (10, 0), (12, 0)}),
        ("lowbit_int8_fp16", set(GPUS) - {(7, 5)}),
        ("sageattn_3_fp4", {(10, 0), (12, 0)}),
        ("sageattn_3", {(10, 0), (12, 0)}),
        ("sageattn_3_fp8", {(8, 9), (9, 0), (12, 0)}),
        ("sageattn", {(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)}),
        ("flash", set(GPUS) - {(7, 5)}),
        ("sdpa", set(GPUS)),
    ],
)
def test_capabilities(name, there, monkeypatch):
    whole = types.SimpleNamespace(
        sageattn3_blackwell=1, sageattn_qk_int8_pv_fp8_cuda=1, sageattn_qk_int8_pv_fp16_cuda=1,
        SM80_ENABLED=True, SM89_ENABLED=True, SM90_ENABLED=True,
    )  # fmt: skip
    monkeypatch.setattr(backends, "load", lambda module: (whole, ""))
    monkeypatch.setattr(backends.int8, "missing_triton", lambda device: None)
    assert {cc for cc, gpu in GPUS.items() if TABLE[name].why_not_here(gpu) is None} == there


def test_what_is_missing_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(backends, "load", lambda module: (None, "not installed"))
    assert str(TABLE["sageattn_3_fp8"].why_not_here(GPUS[9, 0])).startswith(
        "it is not installed; build SageAttention 2.2"
    )
    assert "pip install sageattention" in str(TABLE["sageattn"].why_not_here(GPUS[8, 6]))
    old = types.SimpleNamespace(sageattn=1)
    monkeypatch.setattr(backends, "load", lambda module: (old, ""))
    assert "no FP8 kernels" in str(TABLE["sageattn_3_fp8"].why_not_here(GPUS[9, 0]))
    assert TABLE["sageattn"].why_not_here(GPUS[8, 6]) is None
    assert "not for cc 10 and newer" in str(TABLE["sageattn"].why_not_here(GPUS[12, 0]))
    unbuilt = types.SimpleNamespace(sageattn_qk_int8_pv_fp8_cuda=1, SM90_ENABLED=False)
    monkeypatch.setattr(backends, "load", lambda module: (unbuilt, ""))
    assert "built without kernels for cc 9.0" in str(TABLE["sageattn_3_fp8"].why_not_here(GPUS[9, 0]))


def test_a_sageattention_whose_hopper_kernel_writes_nothing_is_refused_by_name(monkeypatch):
    """Before its pull request 307 the shape function for torch.compile took the kernel's name; the version is the same."""

    def shape_function():
        pass

    class CustomOpDef:
        def __call__(self):
            pass

    for kernel, refused in ((shape_function, True), (CustomOpDef(), False), (None, False)):
        compiled = None if kernel is None else types.SimpleNamespace(**{SAGE_KERNEL: kernel})
        package = types.SimpleNamespace(
            sageattn_qk_int8_pv_fp8_cuda=1, sageattn_qk_int8_pv_fp16_cuda=1, SM90_ENABLED=True, SM89_ENABLED=True,
            sm90_compile=compiled,
        )  # fmt: skip
        monkeypatch.setattr(backends, "load", lambda module, package=package: (package, ""))
        hopper = dataclasses.replace(GPUS[9, 0], packages=(("sageattention", "2.2.0"),))
        for name in ("sageattn_3_fp8", "sageattn"):
            reason = TABLE[name].why_not_here(hopper)
            assert (reason is not None) is refused
            assert not refused or "2.2.0 from before its pull request 307" in str(reason)
            assert TABLE[name].why_not_here(GPUS[8, 9]) is None, "the fault is Hopper's"


def test_masks_are_told_apart():
    q, k, v = fakes.qkv(batch=2)
    for shape, dtype, kind in (
        ((2, 1, 1, 11), torch.bool, "keys"),
        ((1, 1, 1, 11), torch.bool, "keys"),
        ((2, 1, 9, 11), torch.bool, "bool"),
        ((2, 2, 1, 11), torch.bool, "bool"),
        ((2, 1, 1, 11), torch.float32, "float"),
    ):
        assert AttentionCall.of(q, k, v, torch.zeros(shape, dtype=dtype), None).mask == kind


def test_without_a_triton_that_builds_our_own_say_so(monkeypatch):
    monkeypatch.setattr(backends.int8, "kernels_run_on", lambda x: False)
    reason = backends.int8.missing_triton(torch.device("cpu"))
    assert "Triton that can build kernels" in reason


def test_sageattention_1_is_kept_from_lengths_it_miscounts(monkeypatch):
    old = types.SimpleNamespace(sageattn=1)
    monkeypatch.setattr(backends, "load", lambda module: (old, ""))
    gpu = dataclasses.replace(GPUS[8, 6], packages=(("sageattention", "1.0.6"),))
    reason = TABLE["sageattn"].why_not(call(kv_len=257), gpu)
    assert str(reason) == "257 keys; version 1.0.6 counts 63 more that are not there"
    assert TABLE["sageattn"].why_not(call(kv_len=512), gpu) is None
    assert TABLE["sageattn"].why_not(call(kv_len=32760), gpu) is None
    new = types.SimpleNamespace(sageattn_qk_int8_pv_fp16_cuda=1)
    monkeypatch.setattr(backends, "load", lambda module: (new, ""))
    assert TABLE["sageattn"].why_not(call(kv_len=257), gpu) is None


def test_a_broken_package_is_not_a_crash(tmp_path, monkeypatch):
    (tmp_path / "broken_attention_package.py").write_text("raise OSError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    module, reason = environment.load("broken_attention_package")
    assert module is None
    assert "undefined symbol" in reason
    assert environment.load("no_such_attention_package") == (None, "not installed")


@pytest.mark.parametrize("spec", [None, "missing"])
def test_a_bare_module_in_a_packages_place_counts_as_not_installed(spec, monkeypatch):
    """As packs do that keep an import from failing; find_spec raises ValueError on it."""
    bare = types.ModuleType("sageattn3")
    assert bare.__spec__ is None
    if spec == "missing":
        del bare.__spec__
    monkeypatch.setitem(sys.modules, "sageattn3", bare)
    environment.load.cache_clear()
    environment.detect.cache_clear()
    try:
        assert environment.load("sageattn3") == (None, "not installed")
        assert environment.detect(torch.device("cpu")).version("sageattn3") is None
        assert "not installed" in str(TABLE["sageattn_3_fp4"].why_not_here(GPUS[12, 0]))
    finally:
        environment.load.cache_clear()
        environment.detect.cache_clear()


class RecordingSageattn3:
    """A stand-in for the package sageattn3, which needs cc 10: records its call and does what the real one does to K."""

    def __init__(self):
        self.calls = []

    def sageattn3_blackwell(self, q, k, v, attn_mask=None, is_causal=False, per_block_mean=True, **kwargs):
        self.calls.append({"q": q, "k": k, "v": v, "mask": attn_mask, "causal": is_causal, "per_block": per_block_mean})
        self.calls[-1] |= {"more": kwargs}
        k -= k.mean(dim=-2, keepdim=True)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(("name", "per_block"), [("sageattn_3_fp4", True), ("sageattn_3", False)])
@pytest.mark.parametrize("token_major", [False, True])
def test_the_call_contract_of_sageattn3_against_a_recording_stand_in(name, per_block, token_major, monkeypatch):
    package = RecordingSageattn3()
    monkeypatch.setattr(calls, "load", lambda module: (package, ""))
    monkeypatch.setattr(backends, "load", lambda module: (package, ""))
    q, k, v = fakes.qkv(head_dim=64, dtype=torch.bfloat16)
    if token_major:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    k += 5
    before = [x.clone() for x in (q, k, v)]
    backend = TABLE[name]
    assert backend.why_not_here(GPUS[12, 0]) is None
    assert backend.contiguous
    from lowbit.attention.checks import prepared

    out = backend.bind(GPUS[12, 0])(*(prepared(x, backend.contiguous) for x in (q, k, v)), None, None)
    (recorded,) = package.calls
    for x in (recorded["q"], recorded["k"], recorded["v"]):
        assert x.is_contiguous()
        assert x.shape[1] == 2
        assert x.data_ptr() % 16 == 0
    assert recorded["mask"] is None
    assert recorded["causal"] is False
    assert recorded["per_block"] is per_block
    assert recorded["more"] == {}
    for now, then in zip((q, k, v), before, strict=True):
        assert torch.equal(now, then), "the caller's tensors survive"
    torch.testing.assert_close(out.transpose(1, 2).flatten(2).double(), fakes.reference(q, k, v), rtol=0.05, atol=0.02)


class RecordingSageattention:
    """A stand-in for SageAttention 1.0.6 or 2.2 that records which kernel is called how; K is written to as 1.0.6 does."""

    def __init__(self, version):
        self.calls = []
        names = ["sageattn"]
        if version == 2:
            names += [
                f"sageattn_qk_int8_pv_{kind}" for kind in ("fp16_cuda", "fp16_triton", "fp8_cuda", "fp8_cuda_sm90")
            ]
        for name in names:
            setattr(self, name, self._kernel(name, version))

    def _kernel(self, name, version):
        def kernel(q, k, v, tensor_layout="HND", sm_scale=None, smooth_k=True, **options):
            self.calls.append((name, tensor_layout, sm_scale, smooth_k, options, (q, k, v)))
            if version == 1 and smooth_k:
                k -= k.mean(dim=1 if tensor_layout == "NHD" else 2, keepdim=True)
            views = [x.transpose(1, 2) if tensor_layout == "NHD" else x for x in (q, k, v)]
            out = fakes.attend(*views, scale=sm_scale)
            return out.transpose(1, 2) if tensor_layout == "NHD" else out

        return kernel


@pytest.fixture
def no_cuda_device(monkeypatch):
    monkeypatch.setattr(calls, "_keep_current_device", lambda function, *args, **kwargs: function(*args, **kwargs))


@pytest.mark.parametrize(
    ("name", "capability", "cuda", "kernel", "options"),
    [
        ("sageattn", (8, 0), (12, 4), "fp16_cuda", {"pv_accum_dtype": "fp32"}),
        ("sageattn", (8, 6), (12, 8), "fp16_cuda", {"pv_accum_dtype": "fp32"}),
        ("sageattn", (8, 9), (12, 8), "fp8_cuda", {"pv_accum_dtype": "fp32+fp16", "qk_quant_gran": "per_thread"}),
        ("sageattn_3_fp8", (8, 9), (12, 6), "fp8_cuda", {"pv_accum_dtype": "fp32+fp32", "qk_quant_gran": "per_thread"}),
        ("sageattn_3_fp8", (9, 0), (13, 0), "fp8_cuda_sm90", {"pv_accum_dtype": "fp32+fp32"}),
        ("sageattn_3_fp8", (12, 0), (12, 8), "fp8_cuda", {"pv_accum_dtype": "fp32+fp16", "qk_quant_gran": "per_warp"}),
        ("sageattn_fp16", (9, 0), (13, 0), "fp16_cuda", {"pv_accum_dtype": "fp32"}),
    ],
)
def test_sageattention_2_is_called_with_the_kernel_of_the_gpu(
    name, capability, cuda, kernel, options, monkeypatch, no_cuda_device
):
    package = RecordingSageattention(2)
    monkeypatch.setattr(calls, "load", lambda module: (package, ""))
    run = TABLE[name].bind(Environment("cuda", capability, "a GPU", cuda))
    q, k, v = fakes.qkv(head_dim=64)
    for layout in ("HND", "NHD"):
        if layout == "NHD":
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        out = run(q, k, v, None, 0.1)
        called, tensor_layout, scale, smooth_k, given, _ = package.calls[-1]
        assert called == f"sageattn_qk_int8_pv_{kernel}"
        assert (tensor_layout, scale, smooth_k, given) == (layout, 0.1, True, options)
        want = fakes.reference(q, k, v, scale=0.1)
        torch.testing.assert_close(out.transpose(1, 2).flatten(2).double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dim", [48, 64, 80, 96, 128])
def test_sageattention_1_leaves_k_alone_smooths_it_and_pads(head_dim, monkeypatch):
    package = RecordingSageattention(1)
    monkeypatch.setattr(calls, "load", lambda module: (package, ""))
    run = TABLE["sageattn"].bind(GPUS[8, 6])
    q, k, v = fakes.qkv(head_dim=head_dim, heads=4, kv_heads=2, dtype=torch.float16)
    k += 3
    before = k.clone()
    out = run(q, k, v, None, None)
    assert torch.equal(k, before)
    _, layout, scale, smooth_k, _, (sent_q, sent_k, _) = package.calls[-1]
    assert (layout, smooth_k) == ("HND", False)
    assert scale == pytest.approx(head_dim**-0.5)
    assert sent_q.shape[-1] in (64, 128)
    assert sent_k.float().mean(dim=2).abs().max() < 0.01
    torch.testing.assert_close(out.transpose(1, 2).flatten(2).double(), fakes.reference(q, k, v), rtol=0.02, atol=0.01)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        *((size, dtype) for size in (1e-3, 1.0, 900.0, 5e4) for dtype in (torch.bfloat16, torch.float16)),
        (3e38, torch.bfloat16),
    ],
)
def test_values_are_scaled_into_float16_exactly(size, dtype):
    v = (torch.rand(2, 3, 5, 8) * 2 - 1).to(dtype) * size
    v[0, 0] = 0
    scaled, factor = calls.float16_safe_values(v)
    assert scaled.abs().max() <= calls.FLOAT16_VALUE_LIMIT
    assert torch.isfinite(scaled.half()).all()
    assert torch.equal(torch.log2(factor.float()).frac(), torch.zeros_like(factor.float()))
    big = scaled.float().abs() > 2e-2
    torch.testing.assert_close((scaled * factor)[big], v[big], rtol=0, atol=0)


def test_budgets_and_classes_are_one_scale():
    assert list(ERROR_LIMITS) == ["exact", "balanced", "fast", "unbounded"]
    assert list(ERROR_LIMITS.values()) == sorted(ERROR_LIMITS.values())
    assert all(backend.error_class in ERROR_LIMITS for backend in BACKENDS)
    for name in ("sageattn_3_fp4", "sageattn_3"):
        assert TABLE[name].tested_on == (), "never run on Blackwell by us: the table must say so"


def test_the_cpu_environment_is_detected():
    found = environment.detect(torch.device("cpu"))
    assert found.device_type == "cpu"
    assert found.torch == torch.__version__
    assert found.version("triton") == importlib.metadata.version("triton")
    assert found.version("no_such_package") is None
    assert "cpu" in found.fingerprint()
