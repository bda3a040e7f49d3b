"""Looks at how a file's weights arrive in the model that core builds of them: what is missing, left over or no number."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import psutil
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.quant_ops import QuantizedTensor

from ...errors import CheckpointError
from ...ops.finite import MOST_THREADS, FiniteCheck
from ...ops.formats import STORAGES, stored_fits
from ...ops.header import FileStamp
from ...ops.multiplied_out import multiplied_out
from ...ops.quantize import not_finite
from ...ops.stored_scales import as_numbers
from ...ops.stream import RECIPE_KEY
from .operations import is_core_linear

logger = logging.getLogger("lowbit.host")

StateDict = Mapping[str, torch.Tensor]

_SCALE = ".weight_scale"
_CONFIG = ".comfy_quant"
_SMALL_FILE = 64 << 20
_SMALL_TENSOR = 16 << 20
_BESIDE_STEPS = 2
"""Threads that look at a file while steps are made: more of them would hold up who launches kernels."""
_LAYOUTS = {storage.layout: storage for storage in STORAGES.values()}
"""comfy-kitchen's layout -> one of its storages, which are alike in size."""
_loading = threading.RLock()
known_finite: set[tuple[FileStamp, ...]] = set()
"""States of files whose weights are known to be numbers, for clones on other GPUs and models loaded again."""


@dataclass(frozen=True)
class Arrival:
    """One `load_state_dict`: the module, what it was given, and the names that it missed and did not take."""

    module: torch.nn.Module
    state_dict: StateDict
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


@contextlib.contextmanager
def watched(file: str) -> Iterator[list[Arrival]]:
    """The arrivals in the block, on this thread; whatever core trips over there is said of `file`.

    Core only logs what is missing and left over, under names that it has changed by then.

    Raises:
        CheckpointError: core found a tensor missing, or of another size than the model's.
    """
    arrivals: list[Arrival] = []
    thread = threading.get_ident()
    with _loading:
        original = torch.nn.Module.load_state_dict

        def load_state_dict(module: torch.nn.Module, state_dict: StateDict, *args: Any, **kwargs: Any) -> Any:
            result = original(module, state_dict, *args, **kwargs)
            if threading.get_ident() == thread:
                missing, unexpected = tuple(result.missing_keys), tuple(result.unexpected_keys)
                arrivals.append(Arrival(module, dict(state_dict), missing, unexpected))
            return result

        torch.nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign, assignment]
        try:
            yield arrivals
        except KeyError as error:
            raise CheckpointError(
                f"{file} is incomplete: ComfyUI looks for {error} and it is not there, download it again."
            ) from error
        except (RuntimeError, ValueError) as error:
            # What torch says of a parameter, and comfy-kitchen of a scale.
            if not any(said in str(error) for said in ("size mismatch", "must have shape")):
                raise
            raise _unfit(file, str(error).splitlines()[-1].strip()) from error
        finally:
            if torch.nn.Module.load_state_dict is load_state_dict:
                torch.nn.Module.load_state_dict = original  # type: ignore[method-assign]


def settle(arrivals: list[Arrival], file: str, *, optional_parts: bool = False) -> None:
    """Make sure that every layer that multiplies has its weight, every bias is a number, and every stored weight has its scale.

    Where no Linear is, the scale is multiplied out.

    Args:
        arrivals: what `watched` saw.
        file: its name, for errors.
        optional_parts: a file may leave out whole parts, as text encoders' do with what only images need.

    Raises:
        CheckpointError: a Linear or convolution has no weight, or a weight is stored in a shape or way that its layer cannot take.
    """
    for arrival in arrivals:
        modules = dict(arrival.module.named_modules())
        check_shapes(modules, file)
        # A model may be filled from several files, one after the other.
        given = {name for other in arrivals if other.module is arrival.module for name in other.state_dict}
        lost = [name for name in arrival.missing if name not in given and _multiplies(modules.get(_layer(name)))]
        _check_weights(
            [name for name in lost if name.endswith(".weight")], arrival, modules, given, file, optional_parts
        )
        # Of a whole part that is left out nothing is used.
        biases = [name for name in lost if name.endswith(".bias") and f"{_layer(name)}.weight" in given]
        _zero_biases(biases, modules, file)
        unused = set(arrival.unexpected)
        for layer in [name.removesuffix(_CONFIG) for name in unused if name.endswith(_CONFIG)]:
            # What the model does not have at all needs no scale either.
            if f"{layer}.weight" in arrival.state_dict and f"{layer}.weight" not in unused:
                _multiply_out(layer, modules.get(layer), arrival.state_dict, file)


def check_shapes(modules: Mapping[str, torch.nn.Module], file: str) -> None:
    """Make sure that quantized matrices are as large as their layers, which core does not look at and block formats cut to size.

    Raises:
        CheckpointError: one is smaller, or larger than its format pads it.
    """
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        # A table may have more rows than the model has tokens, or fewer.
        if not isinstance(weight, QuantizedTensor) or weight._layout_cls not in _LAYOUTS or not is_core_linear(module):
            continue
        (rows, columns), stored = weight.shape, tuple(weight._qdata.shape)
        if not stored_fits(_LAYOUTS[weight._layout_cls], rows, columns, stored):
            raise _unfit(file, f"'{name}.weight' is stored as {stored}, and its layer is {rows} x {columns}")


def _unfit(file: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{file} does not fit the model that ComfyUI makes of it ({reason[:200].rstrip('.')}): use another file."
    )


class NumbersCheck:
    """Whether a file holds nothing but numbers.

    A small file, or one whose model is in its place, is judged at once. Loading a large one reads only its header: a text encoder's is
    looked at beside core's building of it, and judged when it is put on its device. A diffusion model takes its weights in its first
    evaluation, which any look at the same file would hold up: the look begins with that one's end. It is judged as soon as there is
    an answer, but before sampling ends. Where main memory cannot hold the file, which would then be read from the disk twice, only
    scales and other small tensors are looked at.

    Args:
        file: its name.
        stamps: the state it is in; one that was looked at before is not looked at again.
        metadata: its text entries: what this pack keeps in its cache it has looked at when it wrote it.
        stored: its tensors as they lie there.
        normalized: the same in core's names, which tell what the bytes of block scales are.
        diffusion_model: whether it is one.
    """

    def __init__(
        self,
        file: str,
        stamps: tuple[FileStamp, ...],
        metadata: Mapping[str, str],
        stored: StateDict,
        normalized: StateDict,
        *,
        diffusion_model: bool,
    ) -> None:
        self._file, self._key, self._diffusion_model = file, stamps, diffusion_model
        self._numbers: Iterable[tuple[str, torch.Tensor]] | None = None
        self._check: FiniteCheck | None = None
        # ComfyUI evaluates clones of a model on several GPUs at once.
        self._evaluating = threading.Lock()
        if stamps in known_finite or RECIPE_KEY in metadata:
            return
        nbytes = sum(tensor.nbytes for tensor in stored.values())
        looked_at = list(stored.items())
        if nbytes > psutil.virtual_memory().available:
            looked_at = [(name, tensor) for name, tensor in looked_at if tensor.nbytes <= _SMALL_TENSOR]
        # Core takes what is built out of `normalized`.
        configs = {name: tensor for name, tensor in normalized.items() if name.endswith(_CONFIG)}
        self._numbers = _numbers(looked_at, configs)
        self._small = nbytes <= _SMALL_FILE
        if not diffusion_model:
            self._look(MOST_THREADS)

    def settle(self, patcher: comfy.model_patcher.ModelPatcher) -> None:
        """Judge the file that `patcher` was loaded from.

        Raises:
            CheckpointError: a weight or a scale is NaN or Inf; for a large file, from `patcher`'s own loading or sampling later on.
        """
        # Core loads a text encoder that is to stay in main memory as it makes it.
        if self._numbers is None or self._small or patcher.loaded_size() > 0:
            self._judge()
            return
        patcher.add_callback(CallbacksMP.ON_LOAD, self._loaded)
        if self._diffusion_model:
            patcher.add_wrapper(WrappersMP.APPLY_MODEL, self._evaluated)
            patcher.add_wrapper(WrappersMP.OUTER_SAMPLE, self._sampled)

    def _loaded(self, patcher: Any, device: Any, memory: Any, force_patch_weights: bool = False, *_: Any) -> None:
        # A diffusion model that is loaded to be saved is never evaluated.
        if force_patch_weights or not self._diffusion_model:
            self._judge()

    def _evaluated(self, evaluate: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        result = evaluate(*arguments, **options)
        with self._evaluating:
            if self._numbers is not None and self._look(_BESIDE_STEPS).answered:
                self._judge()
        return result

    def _sampled(self, sample: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        result = sample(*arguments, **options)
        self._judge()
        return result

    def _look(self, threads: int) -> FiniteCheck:
        if self._check is None:
            self._check = FiniteCheck(self._numbers or (), threads)
        return self._check

    def _judge(self) -> None:
        if self._numbers is None:
            return
        name = self._look(MOST_THREADS).first()
        if name is not None:
            raise not_finite(f"{self._file}: {name}")
        self._numbers = self._check = None
        known_finite.add(self._key)


def _numbers(
    stored: Iterable[tuple[str, torch.Tensor]], configs: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in stored:
        layer, _, suffix = name.rpartition(".")
        config = configs.get(layer + _CONFIG) if tensor.dtype == torch.uint8 and not name.endswith(_CONFIG) else None
        core_format = None if config is None else json.loads(config.numpy().tobytes())["format"]
        yield name, as_numbers(suffix, tensor, core_format)


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _check_weights(
    missing: list[str],
    arrival: Arrival,
    modules: Mapping[str, torch.nn.Module],
    given: set[str],
    file: str,
    optional_parts: bool,
) -> None:
    lost = [_layer(name) for name in missing]
    lost += [name for name, module in modules.items() if is_core_linear(module) and module.weight is None]
    if optional_parts:
        lost = [name for name in lost if _part(name) and any(key.startswith(_part(name)) for key in given)]
    if not lost:
        return
    first = lost[0]
    instead = next((name for name in arrival.unexpected if name.startswith(f"{first}.")), None)
    more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
    reason = f"but '{instead}', which ComfyUI cannot use" if instead is not None else "so that it is incomplete"
    raise CheckpointError(
        f"{file} has no weight for the model's layer '{first}'{more}, {reason}: download it again, or use another file."
    )


def _zero_biases(missing: list[str], modules: Mapping[str, Any], file: str) -> None:
    """Core leaves them zero under dynamic VRAM; elsewhere, and in its quantized Linear always, whatever lies in memory."""
    lost = [name for name in missing if modules[_layer(name)].bias is not None]
    for name in lost:
        modules[_layer(name)].bias.data.zero_()
    if lost:
        logger.warning(
            "%s lacks the biases of %d layers, '%s' among them: they are taken as zero.", file, len(lost), lost[0]
        )


def _multiplies(module: torch.nn.Module | None) -> bool:
    convolution = isinstance(module, torch.nn.modules.conv._ConvNd)
    return convolution or isinstance(module, torch.nn.Linear) or (module is not None and is_core_linear(module))


def _part(name: str) -> str:
    """The list of blocks that a layer is in, as a prefix of names; empty for one outside of any."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join([*parts[:number], ""])


def _multiply_out(layer: str, module: torch.nn.Module | None, state_dict: StateDict, file: str) -> None:
    """Give a layer that core has loaded without its scale the weight that the two of them stand for."""
    weight, scale = getattr(module, "weight", None), state_dict.get(layer + _SCALE)
    if isinstance(weight, QuantizedTensor):
        return
    config = json.loads(state_dict[layer + _CONFIG].numpy().tobytes())
    if module is None or not isinstance(weight, torch.Tensor) or scale is None:
        raise CheckpointError(
            f"{file} stores '{layer}' as {config['format']}, and this model has no linear layer of that name that ComfyUI "
            "could multiply so: use the 16-bit file."
        )
    try:
        numbers = multiplied_out(layer, state_dict[f"{layer}.weight"], scale, config)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    dtype = weight.dtype if weight.dtype in (torch.bfloat16, torch.float16, torch.float32) else torch.float32
    module.weight = torch.nn.Parameter(numbers.to(weight.device, dtype), requires_grad=False)
