"""Runs the kernels where they can run: on a GPU, or in Triton's interpreter inside `test_in_interpreter.py`'s process."""

from __future__ import annotations

import functools
import inspect
import math
import os

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_KERNELS_RUN = INTERPRETED or torch.cuda.is_available()
collect_ignore_glob = [] if _KERNELS_RUN else ["test_[!i]*.py"]


def _mend_interpreter() -> None:
    """Two faults of Triton 3.4 to 3.6's interpreter: integers under NumPy 2.4, and casts to and from few bits
    (their rounding, and NaN codes, which its dots took for numbers)."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor, convert = interpreter._patch_lang_tensor, interpreter._convert_float
    torch_dtypes = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}

    def patch(tensor, *scope):
        patch_tensor(tensor, *scope)
        if scope:
            scope[0].set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
        else:
            tensor.__index__ = lambda self: int(self.handle.data.item())

    def cast(data, source, target, rounding_mode):
        if source == tl.float32 and target in torch_dtypes:
            dtype = torch_dtypes[target]
            values = torch.from_numpy(np.ascontiguousarray(data.view(np.float32)))
            limit = torch.finfo(dtype).max
            return values.clamp(-limit, limit).to(dtype).view(torch.uint8).numpy()
        if source == tl.float32 and target == tl.bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(data.view(np.float32)))
            return values.bfloat16().view(torch.uint16).numpy()
        if target == tl.float32 and source in torch_dtypes:
            codes = torch.from_numpy(np.ascontiguousarray(data.view(np.uint8)))
            return codes.view(torch_dtypes[source]).float().numpy().view(np.uint32)
        if target == tl.float16 and source in torch_dtypes:
            codes = torch.from_numpy(np.ascontiguousarray(data.view(np.uint8)))
            return codes.view(torch_dtypes[source]).half().numpy().view(np.uint16)
        return convert(data, source, target, rounding_mode)

    interpreter._patch_lang_tensor = patch
    interpreter._convert_float = cast


def _quicken_interpreter() -> None:
    """It looks for what to patch in all of `triton.language` each time that a function is called, makes a table of
    NumPy's types for each value, and works out the type of each shape: they are always the same."""
    from triton.language import core
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    np_dtype, np_dtypes = interpreter._get_np_dtype, {}

    @functools.cache
    def builtins(package) -> tuple[str, ...]:
        return tuple(name for name, member in inspect.getmembers(package) if is_builtin(member))

    def patch_builtin(package, builder, *scope):
        names = builtins(package)
        if names and not is_builtin(getattr(package, names[0])):
            return  # the function that calls this one has patched them all
        for name in names:
            interpreter._patch_attr(package, name, getattr(package, name), builder, *scope)

    def known_np_dtype(dtype):
        name = dtype.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype(dtype)
        return np_dtypes[name]

    make_block, blocks = core.block_type.__init__, {}

    def known_block(self, element_ty, shape):
        key = type(element_ty), element_ty.name, tuple(map(core._unwrap_if_constexpr, shape))
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    @functools.cache
    def shape_and_size(shape: tuple[int, ...]) -> tuple:
        return core.tuple([core.constexpr(size) for size in shape]), core.constexpr(math.prod(shape))

    def make_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape_and_size(tuple(type.shape) if type.is_block() else ())

    interpreter._patch_builtin = patch_builtin
    interpreter._get_np_dtype = known_np_dtype
    core.block_type.__init__ = known_block
    core.tensor.__init__ = make_tensor


if INTERPRETED:
    _mend_interpreter()
    _quicken_interpreter()
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
