"""Plain values and tensors as JSON and bytes, and back: nothing else travels between processes, and nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...kernels.runtime import dtype_name

_TENSOR, _TUPLE, _DTYPE = "\0tensor", "\0tuple", "\0dtype"
_PLAIN = (str, int, float, bool, type(None))


class NotPlainError(TypeError):
    """A value is neither plain nor a tensor; the message says where it stands and what it is."""


def take_apart(value: Any, name: str = "") -> tuple[Any, list[torch.Tensor]]:
    """The value as what JSON holds, and the tensors in it.

    Args:
        value: dictionaries with names for keys, lists and tuples of plain values, dtypes and tensors.
        name: what the value is, for errors.

    Raises:
        NotPlainError: there is something else in it.
    """
    tensors: list[torch.Tensor] = []
    return _encode(value, name, tensors), tensors


def put_together(value: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """What `take_apart` took apart."""
    if isinstance(value, list):
        return [put_together(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(put_together(value[_TUPLE], tensors))
    if _DTYPE in value:
        return named_dtype(value[_DTYPE])
    return {key: put_together(item, tensors) for key, item in value.items()}


def as_json(value: Any, tensors: Sequence[torch.Tensor]) -> bytes:
    """An encoded value with the dtypes and shapes of its tensors."""
    return json.dumps([value, [[dtype_name(tensor.dtype), list(tensor.shape)] for tensor in tensors]]).encode()


def from_json(text: bytes, device: torch.device) -> tuple[Any, list[torch.Tensor]]:
    """An encoded value, and tensors on `device` that are still to be filled."""
    value, described = json.loads(text)
    return value, [torch.empty(shape, dtype=named_dtype(name), device=device) for name, shape in described]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A flat view of a contiguous tensor's bytes."""
    # A single number that was expanded is contiguous with any stride, and flattening would keep it.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def named_dtype(name: str) -> torch.dtype:
    """torch.float32 of `float32`. Raises ValueError for what is no dtype."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"'{name}' is no dtype.")
    return dtype


def _encode(value: Any, name: str, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor) and type(value) in (torch.Tensor, torch.nn.Parameter):
        tensors.append(value.detach())
        return {_TENSOR: len(tensors) - 1}
    if isinstance(value, torch.dtype):
        return {_DTYPE: dtype_name(value)}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _encode(item, f"{name}.{key}" if name else key, tensors) for key, item in value.items()}
    if isinstance(value, tuple):
        return {_TUPLE: [_encode(item, name, tensors) for item in value]}
    if isinstance(value, list):
        return [_encode(item, name, tensors) for item in value]
    if type(value) in _PLAIN:
        return value
    raise NotPlainError(f"{name or 'a value'} ({type(value).__module__}.{type(value).__qualname__})")
