"""How each attention package is called: tensors shaped (batch, heads, length, head_dim) in and out, K left as it was."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.runtime import ADA, GEFORCE_BLACKWELL, HOPPER
from . import int8  # noqa: F401  (registers the operator)
from .environment import Environment, load

Kernel = Callable[[Tensor, Tensor, Tensor, "Tensor | None", "float | None"], Tensor]

# The largest |V| that 64 unnormalized weights of at most 1 can add up without leaving float16 (64 * 1023 < 65504).
FLOAT16_VALUE_LIMIT = 1023.0


def _is_token_major(x: Tensor) -> bool:
    """Whether (batch, heads, length, head_dim) is a view of memory laid out (batch, length, heads, head_dim)."""
    strides = x.stride()
    return strides[1] < strides[2]


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _pad_head_dim(tensors: tuple[Tensor, ...], supported: tuple[int, ...]) -> tuple[Tensor, ...]:
    head_dim = tensors[0].shape[-1]
    padding = next(size for size in supported if size >= head_dim) - head_dim
    return tuple(F.pad(x, (0, padding)) for x in tensors) if padding else tensors


def float16_safe_values(v: Tensor) -> tuple[Tensor, Tensor]:
    """V scaled by a power of two per head so that float16 sums of it stay finite; the inverse of that power.

    v: (batch, heads, length, head_dim), float16 or bfloat16. Returns V in its dtype and a (batch, heads, 1, 1) factor.
    Kernels that hold V in float16 overflow on the large values of Qwen-Image, which is where its black images come from.
    """
    largest = torch.linalg.vector_norm(v, torch.inf, dim=(2, 3), keepdim=True).float()
    exponent = torch.ceil(torch.log2(largest / FLOAT16_VALUE_LIMIT)).clamp_min(0).nan_to_num(0.0, 0.0, 0.0)
    factor = torch.exp2(exponent)
    return v * (1.0 / factor).to(v.dtype), factor.to(v.dtype)


def _keep_current_device(call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """SageAttention sets the current CUDA device and leaves it so."""
    previous = torch.cuda.current_device()
    try:
        return call(*args, **kwargs)
    finally:
        if torch.cuda.current_device() != previous:
            torch.cuda.set_device(previous)


def _call_sage(
    function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """SageAttention 2: any strides with a last one of 1; the layout of q decides that of the output, so none is copied."""
    if _is_token_major(q):
        out = _keep_current_device(
            function, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), tensor_layout="NHD", sm_scale=scale
        )
        return out.transpose(1, 2)
    return _keep_current_device(function, q, k, v, tensor_layout="HND", sm_scale=scale)


def _call_sage_float16(
    function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """SageAttention 2 with V in float16: bfloat16 values are scaled into its range first."""
    if v.dtype == torch.float16:
        return _call_sage(function, q, k, v, mask, scale)
    v, factor = float16_safe_values(v)
    return _call_sage(function, q, k, v, mask, scale) * _repeat_heads(factor, q.shape[1])


def _call_sage_triton(
    function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """SageAttention 1 (Triton). K's mean is taken off here, out of place: the package does it in the caller's tensor."""
    head_dim = q.shape[-1]
    k = k - k.mean(dim=2, keepdim=True)
    v, factor = float16_safe_values(v)
    q, k, v = _pad_head_dim((q, k, v), (64, 128))
    out = function(
        q,
        k,
        v,
        tensor_layout="HND",
        is_causal=False,
        sm_scale=head_dim**-0.5 if scale is None else scale,
        smooth_k=False,
    )
    return out[..., :head_dim] * _repeat_heads(factor, q.shape[1])


def _call_sageattn3(
    function: Callable[..., Tensor],
    per_block_mean: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """sageattn3: contiguous (batch, heads, length, head_dim). It takes K's mean off in place, so it gets a copy of K."""
    return function(
        q, k.clone(memory_format=torch.contiguous_format), v, is_causal=False, per_block_mean=per_block_mean
    )


def bind_sage_fp8(environment: Environment) -> Kernel:
    """SageAttention 2.2 with the product of weights and V in FP8, smoothed K; the kernel of this compute capability."""
    package = _imported("sageattention")
    if environment.capability == HOPPER:
        function = partial(package.sageattn_qk_int8_pv_fp8_cuda_sm90, pv_accum_dtype="fp32+fp32", smooth_k=True)
        return partial(_call_sage, function)
    # "fp32+fp16" fails to launch when built with CUDA below 12.8.
    accumulate = "fp32+fp16" if environment.cuda >= (12, 8) else "fp32+fp32"
    granularity = "per_warp" if environment.capability >= GEFORCE_BLACKWELL else "per_thread"
    function = partial(
        package.sageattn_qk_int8_pv_fp8_cuda, pv_accum_dtype=accumulate, qk_quant_gran=granularity, smooth_k=True
    )
    return partial(_call_sage, function)


def bind_sage_fp16(environment: Environment) -> Kernel:
    """SageAttention 2.2 with the product of weights and V in float16, accumulated in float32, smoothed K."""
    function = partial(_imported("sageattention").sageattn_qk_int8_pv_fp16_cuda, pv_accum_dtype="fp32", smooth_k=True)
    return partial(_call_sage_float16, function)


def bind_sage_default(environment: Environment) -> Kernel:
    """What the package would pick, without its traps: float32 accumulation on cc 8.x, never the Triton path of cc 8.6."""
    package = _imported("sageattention")
    if not hasattr(package, "sageattn_qk_int8_pv_fp16_cuda"):
        return partial(_call_sage_triton, package.sageattn)
    return bind_sage_fp16(environment) if environment.capability < ADA else bind_sage_fp8(environment)


def bind_sageattn3(environment: Environment, per_block_mean: bool) -> Kernel:
    """SageAttention 3 in FP4; per_block_mean: subtract Q's mean per block of 128 tokens instead of once per head."""
    return partial(_call_sageattn3, _imported("sageattn3").sageattn3_blackwell, per_block_mean)


def _imported(name: str) -> ModuleType:
    package, reason = load(name)
    if package is None:
        raise ImportError(f"{name} is {reason}")
    return package


def bind_comfy_kitchen_int8(environment: Environment) -> Kernel:
    """comfy-kitchen's INT8 attention: masks, grouped K/V heads and any head dim up to 256."""
    int8_attention = _imported("comfy_kitchen").int8_attention

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        return int8_attention(q, k, v, scale=scale, attn_mask=mask)

    return call


def bind_int8(environment: Environment, fp8_values: bool) -> Kernel:
    """This pack's own kernels; fp8_values: weights and V are multiplied in e4m3. Masks of (batch or 1, 1, 1, keys)."""
    attention = torch.ops.lowbit.int8_attention.default

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        return attention(q, k, v, None if mask is None else mask[:, 0, 0], scale, fp8_values)

    return call


def bind_flash(environment: Environment) -> Kernel:
    """FlashAttention 3 where it is installed and the GPU is cc 9.0, else FlashAttention 2's package, else torch's own."""
    names = ("flash_attn_interface", "flash_attn") if environment.capability == HOPPER else ("flash_attn",)
    for name in names:
        package = load(name)[0] if environment.version(name) else None
        if package is not None:
            return partial(_call_flash_package, package.flash_attn_func)
    return _call_torch_flash


def _call_flash_package(
    function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    out = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _call_torch_flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    head_dim = q.shape[-1]
    if head_dim % 8:
        scale = head_dim**-0.5 if scale is None else scale
        q, k, v = _pad_head_dim((q, k, v), (-(-head_dim // 8) * 8,))
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[0][
        ..., :head_dim
    ]


def bind_cudnn(environment: Environment) -> Kernel:
    """cuDNN's fused attention, called directly: torch's context manager for choosing it costs more than a launch."""
    attention = torch.ops.aten._scaled_dot_product_cudnn_attention.default

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
        return attention(q, k, v, mask, False, 0.0, False, False, scale=scale)[0]

    return call


def bind_sdpa(environment: Environment) -> Kernel:
    """torch's scaled_dot_product_attention, with torch's own choice of kernel."""
    attention = F.scaled_dot_product_attention

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        heads = q.shape[1]
        if k.shape[1] == heads:
            return attention(q, k, v, attn_mask=mask, scale=scale)
        if mask is None:
            return attention(q, k, v, scale=scale, enable_gqa=True)
        return attention(q, _repeat_heads(k, heads), _repeat_heads(v, heads), attn_mask=mask, scale=scale)

    return call
