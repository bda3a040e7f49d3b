"""The attention backends, one row each: what finds it, what it takes, how exact it is. Limits are checked here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FunctionType, ModuleType

import torch
from torch.backends.cuda import SDPAParams

from ..kernels.runtime import ADA, AMPERE, BLACKWELL, FLOATS, GEFORCE_BLACKWELL, HALF, HOPPER, TURING, dtype_name
from . import calls, int8
from .environment import Environment, load

ANY_FLOAT = (*FLOATS, torch.float64)
INT32_ELEMENTS = 2**31

# Relative error against float32, ||out - ref|| / ||ref||, that each class of backend and each budget stands for.
# "exact" is what torch's own kernels do in bfloat16 (2.3e-3 measured). "unbounded" is only ever used by name or with FP4 weights.
ERROR_LIMITS = {"exact": 6e-3, "balanced": 2e-2, "fast": 5e-2, "unbounded": float("inf")}
BUDGETS = ("exact", "balanced", "fast")


@dataclass(frozen=True)
class AttentionCall:
    """One attention call, as a backend's limits see it. Lengths in tokens, offsets in elements.

    mask: None, "keys" (bool, one row of keys a batch), "bool" (True is kept) or "float" (added). scale: None for
    head_dim ** -0.5.
    """

    device_type: str
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    mask: str | None = None
    scale: float | None = None

    @classmethod
    def of(
        cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
    ) -> AttentionCall:
        """The call of tensors shaped (batch, heads, length, head_dim)."""
        batch, heads, q_len, head_dim = q.shape
        return cls(
            device_type=q.device.type,
            dtype=q.dtype,
            batch=batch,
            heads=heads,
            kv_heads=k.shape[1],
            q_len=q_len,
            kv_len=k.shape[2],
            head_dim=head_dim,
            value_dim=v.shape[3],
            mask=_mask_kind(mask),
            scale=scale,
        )

    @property
    def elements(self) -> int:
        """Elements of the largest of q, k and v."""
        return self.batch * self.head_dim * max(self.heads * self.q_len, self.kv_heads * self.kv_len)

    def __str__(self) -> str:
        kv_heads = "" if self.kv_heads == self.heads else f"/{self.kv_heads}"
        mask = "" if self.mask is None else f", {self.mask} mask"
        heads = f"{self.batch} x {self.heads}{kv_heads} heads, {self.q_len} x {self.kv_len} tokens"
        return f"{heads}, head dim {self.head_dim}, {dtype_name(self.dtype)}{mask}"


def _mask_kind(mask: torch.Tensor | None) -> str | None:
    """The name of a mask's kind, as `AttentionCall` lists them."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        return "float"
    return "keys" if mask.ndim == 4 and mask.shape[1:3] == (1, 1) else "bool"


@dataclass(frozen=True)
class Reason:
    """Why a backend cannot run. setup: no call of this kind of model can run it here, so asking for it by name is in vain."""

    text: str
    setup: bool = False

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Backend:
    """One backend: needs, limits, call.

    missing: why the package or kernel is not there, None when it is. error_class: key of ERROR_LIMITS.
    capabilities: inclusive (lowest, highest) ranges of compute capability, empty for any device. head_dims: (lowest, highest).
    contiguous: q, k and v must be contiguous in (batch, heads, length, head_dim); others take any strides with a last of 1.
    as_they_are: it takes any strides and addresses at all, so that nothing is ever copied for it.
    tested_on: compute capabilities, or "CPU", where this project has run it.
    max_kv_len: by compute capability, the longest kv for which the error class was seen to hold. further_limit: why a
    call is refused for a reason only this backend has. runtime_check: torch's own word on the very tensors.
    bind: gives the function (q, k, v, mask, scale) -> out for an environment.
    """

    name: str
    title: str
    error_class: str
    bind: Callable[[Environment], calls.Kernel]
    missing: Callable[[Environment], str | None] = lambda environment: None
    install: str = ""
    capabilities: tuple[tuple[tuple[int, int], tuple[int, int]], ...] = ()
    dtypes: tuple[torch.dtype, ...] = HALF
    head_dims: tuple[int, int] = (1, 128)
    only_head_dims: tuple[int, ...] = ()
    masks: tuple[str, ...] = ()
    gqa: bool = True
    scale: bool = True
    other_value_dim: bool = False
    contiguous: bool = False
    as_they_are: bool = False
    max_elements: int | None = None
    min_kv_len: int = 1
    max_kv_len: tuple[tuple[tuple[int, int], int], ...] = ()
    further_limit: Callable[[AttentionCall, Environment], str | None] | None = None
    runtime_check: Callable[[SDPAParams], bool] | None = None
    tested_on: tuple[str, ...] = ()

    def why_not_here(self, environment: Environment) -> Reason | None:
        """Why this backend cannot run on this machine, None when it can."""
        if self.capabilities:
            if environment.device_type != "cuda":
                return Reason("it needs an NVIDIA GPU", setup=True)
            if not any(low <= environment.capability <= high for low, high in self.capabilities):
                return Reason(
                    f"this GPU is cc {environment.compute_capability}, it needs {self.needed_capability}", setup=True
                )
        reason = self.missing(environment)
        return (
            Reason(f"it is {reason}; {self.install}" if self.install else f"it is {reason}", setup=True)
            if reason
            else None
        )

    def why_not(self, call: AttentionCall, environment: Environment) -> Reason | None:
        """Why this backend cannot take this call, None when it can. Checks the call alone: see why_not_here."""
        if call.dtype not in self.dtypes:
            wanted = " or ".join(map(dtype_name, self.dtypes))
            return Reason(f"it takes {wanted}, not {dtype_name(call.dtype)}", setup=True)
        if self.only_head_dims and call.head_dim not in self.only_head_dims:
            return Reason(
                f"head dim {call.head_dim}; it takes {' and '.join(map(str, self.only_head_dims))}", setup=True
            )
        if not self.head_dims[0] <= call.head_dim <= self.head_dims[1]:
            return Reason(f"head dim {call.head_dim}; it takes up to {self.head_dims[1]}", setup=True)
        if call.value_dim != call.head_dim and not self.other_value_dim:
            return Reason(f"V has head dim {call.value_dim}, Q and K have {call.head_dim}", setup=True)
        if call.mask is not None and call.mask not in self.masks:
            return Reason("it takes no mask but one of keys" if self.masks == ("keys",) else "it takes no mask")
        if call.heads % call.kv_heads or (call.kv_heads != call.heads and not self.gqa):
            return Reason(f"{call.heads} query heads over {call.kv_heads} key heads")
        if call.scale is not None and not self.scale and abs(call.scale - call.head_dim**-0.5) > 1e-6 * call.scale:
            return Reason("it takes no softmax scale of its own")
        if min(call.batch, call.q_len, call.kv_len) == 0:
            return Reason("an empty input")
        if call.kv_len < self.min_kv_len:
            return Reason(f"{call.kv_len} keys; it needs {self.min_kv_len}")
        if self.max_elements is not None and call.elements >= self.max_elements:
            return Reason(f"an input of {call.elements} elements; its offsets are 32-bit")
        limit = dict(self.max_kv_len).get(environment.capability)
        if limit is not None and call.kv_len > limit:
            return Reason(f"{call.kv_len} keys; its error grows past {limit} on cc {environment.compute_capability}")
        further = self.further_limit(call, environment) if self.further_limit is not None else None
        return None if further is None else Reason(further)

    def accepts(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> bool:
        """Asks torch whether its kernel takes these very tensors; True for backends that torch knows nothing of."""
        if self.runtime_check is None or not q.is_cuda:
            return True
        return self.runtime_check(SDPAParams(q, k, v, mask, 0.0, False, q.shape[1] != k.shape[1]))

    @property
    def needed_capability(self) -> str:
        """As people write it: "8.9, 9.0 or 12.0-12.1"."""
        ranges = [
            f"{low[0]}.{low[1]}"
            if low == high
            else f"{low[0]}.{low[1]} or newer"
            if high[0] > 90
            else f"{low[0]}.{low[1]}-{high[0]}.{high[1]}"
            for low, high in self.capabilities
        ]
        return " or ".join(filter(None, [", ".join(ranges[:-1]), ranges[-1]])) if ranges else "any"


NEWEST = (99, 0)
AMPERE_AND_NEWER = ((AMPERE, NEWEST),)
GEFORCE_50 = (GEFORCE_BLACKWELL, (12, 1))
ANY_BLACKWELL = ((BLACKWELL, BLACKWELL), GEFORCE_50)
UP_TO_HOPPER_AND_GEFORCE_50 = ((AMPERE, HOPPER), GEFORCE_50)
SAGE_2 = "build SageAttention 2.2 from github.com/thu-ml/SageAttention (it is not on PyPI)"
SAGE_3 = "build sageattn3 from github.com/thu-ml/SageAttention, folder sageattention3_blackwell (it is not on PyPI)"


def _sage_missing(environment: Environment, function: str, kernels: str, built: str, capability: str) -> str | None:
    """Why SageAttention 2's `function` is not there: no package, a version without it, or not built for a capability."""
    package, reason = load("sageattention")
    if package is None:
        return reason
    if not hasattr(package, function):
        return f"version {environment.version('sageattention')}, which has no {kernels} kernels"
    core, _ = load("sageattention.core")
    return None if getattr(core, built, False) else f"built without kernels for cc {capability}"


def _sage_fp8_missing(environment: Environment) -> str | None:
    hopper = environment.capability == HOPPER
    built = "SM90_ENABLED" if hopper else "SM89_ENABLED"
    reason = _sage_missing(environment, "sageattn_qk_int8_pv_fp8_cuda", "FP8", built, environment.compute_capability)
    if reason is None and hopper and _calls_the_fake(load("sageattention.core")[0]):
        return (
            f"version {environment.version('sageattention')} from before its pull request 307 (December 2025), whose "
            "output for cc 9.0 is memory that nothing has written"
        )
    return reason


def _calls_the_fake(core: ModuleType | None) -> bool:
    """Whether the name of SageAttention's Hopper kernel means the shape function of torch.compile, which came after it
    under the same name and writes nothing; the version is 2.2.0 before and after this was mended."""
    compiled = getattr(core, "sm90_compile", None)
    return isinstance(getattr(compiled, "qk_int8_sv_f8_accum_f32_fuse_v_scale_attn_inst_buf", None), FunctionType)


def _sage_fp16_missing(environment: Environment) -> str | None:
    return _sage_missing(environment, "sageattn_qk_int8_pv_fp16_cuda", "CUDA", "SM80_ENABLED", "8.0")


def _sage_default_missing(environment: Environment) -> str | None:
    package, reason = load("sageattention")
    if package is None:
        return reason
    if not hasattr(package, "sageattn_qk_int8_pv_fp16_cuda"):
        triton_only = (
            f"version {environment.version('sageattention')}, whose Triton kernels are not for cc 10 and newer"
        )
        return triton_only if environment.capability >= BLACKWELL else None
    return _sage_fp16_missing(environment) if environment.capability < ADA else _sage_fp8_missing(environment)


SAGE_1_TILE = 64
SAGE_1_PHANTOM_KEYS = 1e-3


def _sage_default_limit(call: AttentionCall, environment: Environment) -> str | None:
    """SageAttention 1 counts the keys that fill its last tile, which are not there, with a score of 0 each.

    After smoothing, 0 is the mean of each row's scores, so they take at most their share of the row's weight: seen on
    an H200 as an error of 0.13 with 257 keys.
    """
    package, _ = load("sageattention")
    phantom = -call.kv_len % SAGE_1_TILE
    if hasattr(package, "sageattn_qk_int8_pv_fp16_cuda") or phantom <= SAGE_1_PHANTOM_KEYS * call.kv_len:
        return None
    return (
        f"{call.kv_len} keys; version {environment.version('sageattention')} counts {phantom} more that are not there"
    )


def _sageattn3_missing(environment: Environment) -> str | None:
    package, reason = load("sageattn3")
    if package is None:
        return reason
    return None if hasattr(package, "sageattn3_blackwell") else "there, but without sageattn3_blackwell"


def _comfy_kitchen_missing(environment: Environment) -> str | None:
    package, reason = load("comfy_kitchen")
    if package is None:
        return reason
    if not hasattr(package, "int8_attention"):
        return f"version {environment.version('comfy_kitchen')}, which has no INT8 attention"
    return (
        None
        if package.int8_attention_is_available()
        else "installed, but its CUDA extension needs torch built with CUDA 13"
    )


def _cudnn_missing(environment: Environment) -> str | None:
    if not hasattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention"):
        return f"not in torch {environment.torch}"
    return None if torch.backends.cudnn.is_available() else "off: torch finds no cuDNN"


# What both kernels of a package have in common.
_own = partial(
    Backend,
    missing=lambda environment: int8.missing_triton(torch.device(environment.device_type)),
    install="pip install triton (triton-windows on Windows)",
    head_dims=(32, 128),
    masks=("keys",),
    as_they_are=True,
    tested_on=("9.0",),
)
_sageattn3 = partial(
    Backend,
    error_class="unbounded",
    missing=_sageattn3_missing,
    install=SAGE_3,
    capabilities=ANY_BLACKWELL,
    only_head_dims=(64, 128),
    gqa=False,
    scale=False,
    contiguous=True,
    max_elements=INT32_ELEMENTS,
)

BACKENDS: tuple[Backend, ...] = (
    _own(
        name="lowbit_int8_fp8",
        title="this pack's own, INT8 scores and FP8 values",
        error_class="fast",
        bind=partial(calls.bind_int8, fp8_values=True),
        capabilities=((ADA, NEWEST),),
    ),
    _own(
        name="lowbit_int8_fp16",
        title="this pack's own, INT8 scores and 16-bit values",
        error_class="balanced",
        bind=partial(calls.bind_int8, fp8_values=False),
        capabilities=AMPERE_AND_NEWER,
    ),
    _sageattn3(
        name="sageattn_3_fp4",
        title="SageAttention 3, FP4, Q's mean taken off per block",
        bind=partial(calls.bind_sageattn3, per_block_mean=True),
    ),
    Backend(
        name="sageattn_3_fp8",
        title="SageAttention 2.2, INT8 scores and FP8 values",
        error_class="fast",
        missing=_sage_fp8_missing,
        bind=calls.bind_sage_fp8,
        install=SAGE_2,
        capabilities=((ADA, ADA), (HOPPER, HOPPER), GEFORCE_50),
        # Users report noise past 160k tokens on cc 12.0.
        max_kv_len=tuple((capability, 160_000) for capability in GEFORCE_50),
        tested_on=("9.0",),
        max_elements=INT32_ELEMENTS,
    ),
    _sageattn3(
        name="sageattn_3",
        title="SageAttention 3, FP4, Q's mean taken off once per head",
        bind=partial(calls.bind_sageattn3, per_block_mean=False),
    ),
    Backend(
        name="sageattn",
        title="SageAttention's own pick for this GPU (FP8 values from cc 8.9 on, float16 before, Triton in 1.0.6)",
        error_class="fast",
        missing=_sage_default_missing,
        bind=calls.bind_sage_default,
        install="pip install sageattention for the Triton version, or " + SAGE_2,
        capabilities=UP_TO_HOPPER_AND_GEFORCE_50,
        max_kv_len=tuple((capability, 160_000) for capability in GEFORCE_50),
        min_kv_len=128,
        further_limit=_sage_default_limit,
        tested_on=("9.0",),
        max_elements=INT32_ELEMENTS,
    ),
    Backend(
        name="sageattn_fp16",
        title="SageAttention 2.2, INT8 scores and float16 values accumulated in float32",
        error_class="balanced",
        missing=_sage_fp16_missing,
        bind=calls.bind_sage_fp16,
        install=SAGE_2,
        capabilities=UP_TO_HOPPER_AND_GEFORCE_50,
        # Below one tile of keys it reads shared memory nothing has written: NaN, seen on an H200 with 1, 3 and 32 keys.
        min_kv_len=128,
        tested_on=("9.0",),
        max_elements=INT32_ELEMENTS,
    ),
    Backend(
        name="comfy_kitchen_int8",
        title="comfy-kitchen INT8",
        error_class="balanced",
        missing=_comfy_kitchen_missing,
        bind=calls.bind_comfy_kitchen_int8,
        install="pip install comfy-kitchen",
        capabilities=((TURING, NEWEST),),
        dtypes=FLOATS,
        head_dims=(1, 256),
        masks=("keys", "bool", "float"),
        tested_on=("9.0",),
        max_elements=INT32_ELEMENTS,
    ),
    Backend(
        name="flash",
        title="FlashAttention (3 or 2 where installed, else torch's own)",
        error_class="exact",
        bind=calls.bind_flash,
        capabilities=AMPERE_AND_NEWER,
        head_dims=(1, 256),
        runtime_check=torch.backends.cuda.can_use_flash_attention,
        tested_on=("9.0",),
    ),
    Backend(
        name="cudnn",
        title="cuDNN's fused attention",
        error_class="exact",
        missing=_cudnn_missing,
        bind=calls.bind_cudnn,
        capabilities=AMPERE_AND_NEWER,
        masks=("keys", "bool", "float"),
        runtime_check=torch.backends.cuda.can_use_cudnn_attention,
        tested_on=("9.0",),
    ),
    Backend(
        name="sdpa",
        title="torch's scaled_dot_product_attention with torch's own pick",
        error_class="exact",
        bind=calls.bind_sdpa,
        dtypes=ANY_FLOAT,
        head_dims=(1, 2**16),
        masks=("keys", "bool", "float"),
        other_value_dim=True,
        tested_on=("9.0", "CPU"),
    ),
)

# The names under which ComfyUI's own attention, the last resort, is listed and counted: the kernel it would pick, and
# attention_pytorch where that kernel is lossy (--use-sage-attention, --use-ck-attention, a choice on the model).
CORE = "core"
CORE_EXACT = "core_pytorch"


def backend_names() -> tuple[str, ...]:
    """Every backend's name, in the order of the table."""
    return tuple(backend.name for backend in BACKENDS)


def by_name(backends: tuple[Backend, ...] = BACKENDS) -> dict[str, Backend]:
    """The table as a dictionary."""
    return {backend.name: backend for backend in backends}
