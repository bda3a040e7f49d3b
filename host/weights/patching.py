"""Core's patcher for quantized models: LoRAs stay beside the weights, and hooks find what core expects of a weight."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_patcher
import comfy.utils
import torch
from comfy.quant_ops import QuantizedTensor

from ...errors import CapabilityError
from ...ops.side_product import LowRankUpdate, SideProduct
from ...versions import find, missing
from ..in_front import class_in_front
from .core_names import PATCHING
from .operations import QuantizedLinear, holds_quantized

_LoRA = find("comfy.weight_adapter.lora.LoRAAdapter")
_Lazy = find("comfy.model_patcher.LazyCastingParamPiece") or torch.nn.Parameter
_Caster = find("comfy.model_patcher.LazyCastingQuantizedParam")

_WEIGHT = ".weight"
_IN_WEIGHTS = "_lowbit_in_weights"
"""On a model: what core has done to its weights since it was loaded."""


@dataclass(frozen=True)
class _InWeights:
    """What core does to a model's weights for one patcher; equal for those that need not load them anew.

    Attributes:
        identity: names, strengths and the identities of the objects that hold the rest.
        alive: those objects, so that no others get their identities.
    """

    identity: tuple[Any, ...]
    alive: list[Any] = field(compare=False)


class PatchedPart(_Lazy):  # type: ignore[misc, valid-type]
    """Core's placeholder for a tensor that is patched when it is written, for integers too."""

    def __new__(cls, caster: Any, key: str, tensor: torch.Tensor) -> PatchedPart:
        """`tensor` only lends its shape and dtype."""
        return torch.Tensor._make_subclass(cls, tensor, False)


class _Numbers(dict[str, torch.Tensor]):
    """A state dict that decodes a quantized weight when it is looked up, so that no more than one is in memory."""

    def __getitem__(self, key: str) -> torch.Tensor:
        value = super().__getitem__(key)
        return value.dequantize() if isinstance(value, QuantizedTensor) else value


class QuantizedModelPatcher(comfy.model_patcher.ModelPatcher):
    """Mixin over core's patchers: a LoRA on a quantized linear becomes its `side_product`, and leaves the weight alone.

    Core decodes such a weight, adds the LoRA and quantizes the sum again, with a second quantization's error. Patches
    that are not low-rank go that way still. `patches` lists all of them for whoever looks; core sees the others alone
    while it loads.
    """

    patches: dict[str, list[Any]]
    _all_patches: dict[str, list[Any]] | None = None

    def clone(self, *args: Any, **kwargs: Any) -> comfy.model_patcher.ModelPatcher:
        """Core's clone: the one without dynamic VRAM, whose class core names, patches the same way."""
        return patch_beside_weights(super().clone(*args, **kwargs))

    def load(self, device_to: Any = None, lowvram_model_memory: int = 0, **kwargs: Any) -> None:
        """Core's load, the LoRAs' room left free where the model has only part of the memory."""
        self._set_side_products(None)
        if lowvram_model_memory and not kwargs.get("full_load"):
            needed = sum(side.factors_nbytes(module.weight.dtype) for module, side in self._side_products())
            lowvram_model_memory = max(1, lowvram_model_memory - needed)
        with self._only_other_patches():
            super().load(device_to, lowvram_model_memory=lowvram_model_memory, **kwargs)
        setattr(self.model, _IN_WEIGHTS, self._in_weights())
        self._keep_side_products()
        # Core has just counted the weights anew.
        self.model.model_loaded_weight_memory += sum(side.resident_nbytes for _, side in self._side_products())

    def partially_load(self, device_to: Any, extra_memory: int = 0, force_patch_weights: bool = False) -> int | None:
        """Core's; where only LoRAs beside the weights differ from what is loaded, the weights stay where they are."""
        alike = getattr(self.model, _IN_WEIGHTS, None) == self._in_weights() and not force_patch_weights
        if alike and self.model.current_weight_patches_uuid is not None:
            self.model.current_weight_patches_uuid = self.patches_uuid
        loaded = super().partially_load(device_to, extra_memory, force_patch_weights)
        # Core leaves early where all is loaded.
        self._set_side_products(self.current_hooks)
        self.model.model_loaded_weight_memory += self._keep_side_products()
        return loaded

    def partially_unload(self, *args: Any, **kwargs: Any) -> int:
        """Core's; the LoRAs of what left the GPU leave with it."""
        with self._only_other_patches():
            freed = super().partially_unload(*args, **kwargs)
        for module, side in self._side_products():
            if not self._is_resident(module):
                freed += self._release(side)
        return freed

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        """Core's; LoRAs leave with the other patches on weights."""
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            setattr(self.model, _IN_WEIGHTS, None)
            for module in quantized_linears(self.model).values():
                module.side_product = None

    def patch_hooks(self, hooks: Any) -> None:
        """Core's; the LoRAs among the hooks are exchanged beside the weights, without quantizing any."""
        super().patch_hooks(hooks)
        self._set_side_products(hooks)
        if self.model.model_loaded_weight_memory:
            self.model.model_loaded_weight_memory += self._keep_side_products()

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        """Core's, and the hooks' LoRAs; quantized weights are put back themselves, not copied into the patched ones.

        Core copies values into a view of a parameter, whose scales are not the parameter's.
        """
        hooked = self.current_hooks is not None
        for key in set(self.hook_backup) & (whitelist_keys_set or set(self.hook_backup)):
            if self._quantized(key) is not None:
                weight, device = self.hook_backup.pop(key)
                comfy.utils.set_attr_param(self.model, key, weight.to(device=device))
        super().unpatch_hooks(whitelist_keys_set)
        if hooked and not whitelist_keys_set:
            self._set_side_products(None)

    def patch_cached_hook_weights(self, cached_weights: Any, key: str, memory_counter: Any) -> None:
        """Core's; a quantized weight is exchanged for the one kept from the last time."""
        weight = self._quantized(key)
        if weight is None:
            super().patch_cached_hook_weights(cached_weights, key, memory_counter)
            return
        self._back_up(key, weight, memory_counter)
        kept, device = cached_weights[key]
        comfy.utils.set_attr_param(self.model, key, kept.to(device=device))

    def patch_hook_weight_to_device(
        self, hooks: Any, combined_patches: Any, key: str, original_weights: Any, memory_counter: Any
    ) -> None:
        """Core's; what it keeps for the next turn is the weight that it made, quantized, not the one it made it of."""
        weight = self._quantized(key)
        if weight is not None:
            self._back_up(key, weight, memory_counter)
        super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)
        kept = self.cached_hook_patches.get(hooks, {})
        made = self._quantized(key)
        if key in kept and made is not None:
            kept[key] = (made.to(device=kept[key][0].device), made.device)

    def add_hook_patches(self, hook: Any, patches: Mapping[Any, Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Core's.

        Raises:
            CapabilityError: the hook is another model that is quantized, whose codes core would add as numbers.
        """
        coded = next((key for key in patches if str(key).endswith(".comfy_quant")), None)
        if coded is not None:
            raise CapabilityError(
                f"The hook's model is quantized ('{coded}'), and ComfyUI would take its codes for weights: make the hook of "
                "the 16-bit checkpoint."
            )
        return super().add_hook_patches(hook, patches, *args, **kwargs)

    def get_combined_hook_patches(self, hooks: Any) -> dict[str, list[Any]]:
        """Core's, less those that stand beside their weights; the others find in the weight what is on it without hooks.

        They may set, turn or scale it.
        """
        combined = self._others(super().get_combined_hook_patches(hooks))
        patches = self._all_patches if self._all_patches is not None else self.patches
        beside = {key: patches[key] for key in combined.keys() & patches.keys() - self._others(patches).keys()}
        return {key: [*beside.get(key, ()), *values] for key, values in combined.items()}

    def model_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Core's, with the numbers that quantized weights stand for: it lists their codes."""
        state = super().model_state_dict(*args, **kwargs)
        weights = {key: self._quantized(key) for key in state if key.endswith(_WEIGHT)}
        return _Numbers(state | {key: weight for key, weight in weights.items() if weight is not None})

    def model_state_dict_for_saving(self, model: Any = None, prefix: str = "") -> dict[str, torch.Tensor]:
        """Core's; quantized weights whose patches are not in them are patched as they are written, one at a time."""
        modules = {f"{name}.": module for name, module in quantized_linears(self.model).items()}
        pending = [name for name, module in modules.items() if self._is_pending(name + "weight", module)]
        streamed = [module for module in modules.values() if not getattr(module, "comfy_patched_weights", False)]
        # Core makes lazy parameters of streamed ones, and cannot of integers.
        for module in streamed:
            module.comfy_patched_weights = True
        try:
            state = super().model_state_dict_for_saving(model, prefix)
        finally:
            for module in streamed:
                module.comfy_patched_weights = False
        for name in pending:
            caster = _Caster(self, name + "weight")
            for key in modules[name].weight.state_dict(name + "weight"):
                own = key.removeprefix(prefix)
                state[own] = PatchedPart(caster, key, state[own])
        return state

    def _is_pending(self, key: str, module: QuantizedLinear) -> bool:
        """Whether there are patches that the weight, as it is now, does not hold."""
        in_weight = getattr(module, "comfy_patched_weights", False) and module.side_product is None
        return key in self.patches and not in_weight

    def _quantized(self, key: str) -> QuantizedTensor | None:
        weight = comfy.utils.get_attr(self.model, key)
        return weight if isinstance(weight, QuantizedTensor) else None

    def _back_up(self, key: str, weight: QuantizedTensor, memory_counter: Any) -> None:
        """Keep what hooks take the place of: where it is, if core's count of free memory allows it."""
        if key not in self.hook_backup:
            stays = memory_counter is not None and memory_counter.use(weight)
            kept = weight if stays else weight.to(device=self.offload_device)
            self.hook_backup[key] = (kept, weight.device)

    @contextlib.contextmanager
    def _only_other_patches(self) -> Iterator[None]:
        """Hide from core the patches that stand beside their weights."""
        if self._all_patches is not None:
            yield
            return
        self._all_patches = self.patches
        self.patches = self._others(self.patches)
        try:
            yield
        finally:
            self.patches, self._all_patches = self._all_patches, None

    def _in_weights(self) -> _InWeights:
        patches = self._others(self._all_patches if self._all_patches is not None else self.patches)
        identity: list[Any] = [self.force_cast_weights, str(self.load_device)]
        for key, values in sorted(patches.items()):
            identity += [(key, strength, id(value), *more[:2], id(more[2])) for strength, value, *more in values]
        for key, functions in sorted(self.weight_wrapper_patches.items()):
            identity.append((key, *map(id, functions)))
        return _InWeights(tuple(identity), [patches, dict(self.weight_wrapper_patches)])

    def _others(self, patches: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        modules = quantized_linears(self.model)
        return {key: value for key, value in patches.items() if _updates(modules, key, value) is None}

    def _side_products(self) -> list[tuple[QuantizedLinear, SideProduct]]:
        """The linears with LoRAs beside them."""
        modules = quantized_linears(self.model).values()
        return [(module, module.side_product) for module in modules if module.side_product is not None]

    def _set_side_products(self, hooks: Any) -> None:
        """Give every linear the LoRAs of the patches and of `hooks` on it."""
        modules = quantized_linears(self.model)
        patches = self._all_patches if self._all_patches is not None else self.patches
        hooked = super().get_combined_hook_patches(hooks) if hooks is not None else {}
        for name, module in modules.items():
            key = name + _WEIGHT
            always, now = (_updates(modules, key, source.get(key, ())) for source in (patches, hooked))
            # Hooks that core applies have all of them in the weight.
            updates = [*(always or ()), *now] if now is not None else []
            if module.side_product is not None:
                if module.side_product.is_of(updates):
                    continue
                self._release(module.side_product)
            module.side_product = SideProduct(updates) if updates else None

    def _keep_side_products(self) -> int:
        """Put the LoRAs of linears whose weights stay on the GPU there; returns the bytes this took."""
        kept = 0
        for module, side in self._side_products():
            if not side.resident_nbytes and self._is_resident(module):
                side.keep(self.load_device, module.weight.dtype)
                kept += side.resident_nbytes
        return kept

    def _is_resident(self, module: QuantizedLinear) -> bool:
        """Whether the module's LoRA may stay on the GPU: dynamic VRAM makes room for it by itself."""
        if self.is_dynamic():
            return self.model.model_loaded_weight_memory > 0
        return module.weight.device.type == self.load_device.type

    def _release(self, side: SideProduct) -> int:
        nbytes = side.resident_nbytes
        self.model.model_loaded_weight_memory = max(0, self.model.model_loaded_weight_memory - nbytes)
        side.release()
        return nbytes


def patch_beside_weights(patcher: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """`patcher` itself, from now on a `QuantizedModelPatcher` where its model has quantized layers of ours."""
    if isinstance(patcher, QuantizedModelPatcher) or not holds_quantized(patcher.model):
        return patcher
    if not missing(PATCHING):
        patcher.__class__ = class_in_front(type(patcher), QuantizedModelPatcher)
    return patcher


def quantized_linears(model: torch.nn.Module) -> dict[str, QuantizedLinear]:
    """The linears of ours in `model`, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def _updates(modules: Mapping[str, QuantizedLinear], key: str, patches: Sequence[Any]) -> list[Any] | None:
    """The low-rank updates that `patches` are, or None where core has to apply them to the weight."""
    module = modules.get(key.removesuffix(_WEIGHT)) if key.endswith(_WEIGHT) else None
    return low_rank_updates(patches, module.weight.shape) if module is not None else None


def low_rank_updates(patches: Sequence[Any], shape: Sequence[int]) -> list[LowRankUpdate] | None:
    """Core's patches on a weight of (rows, columns) as low-rank updates, or None where one of them is anything else.

    A DoRA, a LoHa or LoKr, a difference, another model's weight, a patch that scales the weight: those have no small
    factors, or need the weight itself.
    """
    updates = [_low_rank_update(patch, shape) for patch in patches]
    return None if None in updates else updates  # type: ignore[return-value]


def _low_rank_update(patch: Any, shape: Sequence[int]) -> LowRankUpdate | None:
    strength, adapter, strength_model, offset, function = patch
    if type(adapter) is not _LoRA or strength_model != 1.0 or function is not None:
        return None
    up, down, alpha, *others = adapter.weights
    dimension, first_row, rows = offset if offset is not None else (0, 0, shape[0])
    if dimension != 0 or any(other is not None for other in others):
        return None
    up, down = up.flatten(start_dim=1), down.flatten(start_dim=1)
    fits = up.shape[0] == rows and first_row + rows <= shape[0] and down.shape == (up.shape[1], shape[1])
    if not fits or not (up.is_floating_point() and down.is_floating_point()):
        return None
    scale = strength * (float(alpha) / down.shape[0] if alpha is not None else 1.0)
    return LowRankUpdate(up, down, scale, first_row)
