"""The tensors that a file has for one layer, and what they are decoded to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..errors import CheckpointError
from .header import TensorEntry

Read = Callable[[TensorEntry], torch.Tensor]
Shape = tuple[int, ...]
Decode = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Decoded:
    """A tensor that a layer's stored tensors are decoded to.

    Attributes:
        shape: of it.
        parts: what it is made of: suffixes by the names that `decode` has for them.
        decode: makes it of them.
    """

    shape: Shape
    parts: Mapping[str, str]
    decode: Decode


@dataclass(frozen=True)
class Found:
    """A layer of a scheme.

    Attributes:
        what: the scheme in words, behind "is".
        weight: what its weight is decoded from.
        bias: what its bias is, where that is packed too.
        renamed: the tool has names of its own for the model's layers.
        either_axis: its scales could as well be those of the other dimension; what other layers of the file have tells.
    """

    what: str
    weight: Decoded
    bias: Decoded | None = None
    renamed: bool = False
    either_axis: bool = False


@dataclass(frozen=True)
class LayerTensors:
    """The tensors below one layer's name.

    Attributes:
        name: of the layer.
        tensors: by what follows its name and a dot.
        read: gives a small one's value.
    """

    name: str
    tensors: Mapping[str, TensorEntry]
    read: Read

    def __contains__(self, suffix: str) -> bool:
        return suffix in self.tensors

    def dtype(self, suffix: str) -> torch.dtype:
        return self.tensors[suffix].dtype

    def shape(self, suffix: str) -> Shape:
        return self.tensors[suffix].shape

    def value(self, suffix: str) -> torch.Tensor:
        return self.read(self.tensors[suffix])

    def is_matrix(self, suffix: str, *dtypes: torch.dtype) -> bool:
        """Whether a tensor has two dimensions and one of these dtypes."""
        return len(self.shape(suffix)) == 2 and self.dtype(suffix) in dtypes

    def there(self, **suffixes: str) -> dict[str, str]:
        """Those of `suffixes`, by any names, that the file has; one without elements is none."""
        return {
            name: suffix for name, suffix in suffixes.items() if suffix in self.tensors and 0 not in self.shape(suffix)
        }

    def need(self, what: str, shapes: Mapping[str, Shape | int | None]) -> None:
        """Make sure that tensors are there and fit.

        Args:
            what: the layer is, for the error.
            shapes: by suffix, a shape, a number of elements, or None for any.

        Raises:
            CheckpointError: one is missing, or has another shape.
        """
        for suffix, wanted in shapes.items():
            if suffix not in self.tensors:
                raise CheckpointError(
                    f"the layer '{self.name}' is {what}, and its '{suffix}' is missing: the file is incomplete, download it "
                    "again."
                )
            shape = self.shape(suffix)
            if wanted is not None and wanted != (math.prod(shape) if isinstance(wanted, int) else shape):
                raise self.unfit(what, suffix)

    def unfit(self, what: str, suffix: str) -> CheckpointError:
        """The error that a tensor has a shape that the layer, which is `what`, cannot have."""
        return CheckpointError(
            f"the layer '{self.name}' is {what}, and its '{suffix}' of shape {self.shape(suffix)} and {str(self.dtype(suffix)).removeprefix('torch.')} does not fit: the file is "
            "damaged, or of a version of that tool that is not known here."
        )
