"""Points what a clone carries (compiled blocks, LoRAs by bypass, replaced methods) at the layers of another model."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from torch._dynamo import OptimizedModule

from ...errors import CapabilityError

_CARRIED = ("object_patches", "injections", "wrappers", "callbacks", "weight_wrapper_patches", "attachments")
_COMPILED = "_orig_mod"
_OPAQUE = (torch.Tensor, type, types.ModuleType, types.BuiltinFunctionType, str, bytes, int, float, complex, type(None))
_MOST_OBJECTS = 200_000


def rebind(patcher: comfy.model_patcher.ModelPatcher, old: torch.nn.Module, new: torch.nn.Module) -> None:
    """Have everything on `patcher` that reaches a layer of `old` reach the layer of that name in `new`.

    Functions, methods, compiled modules, containers and objects on the way to such a layer are copied, once each, so
    that what they share stays shared; all else stays the very same object, other models' patchers among it.

    Raises:
        CapabilityError: something that reaches a layer cannot be copied, or the layer has none of its name.
    """
    rebinder = _Rebinder(_counterparts(old, new))
    for name in (*_CARRIED, "model_options"):
        carried = getattr(patcher, name)
        setattr(patcher, name, {key: rebinder.rebound(value, f"{name}: {key}") for key, value in carried.items()})


def check_untouched(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Make sure that no other node changed the model's layers themselves, in a way that no clone carries.

    What core has put in for a clone that is loaded goes when that one is unloaded.

    Raises:
        CapabilityError: a layer has hooks, or a forward of its own.
    """
    if _touched(patcher.model.diffusion_model) is not None:
        comfy.model_management.unload_model_and_clones(patcher)
    name = _touched(patcher.model.diffusion_model)
    if name is not None:
        raise CapabilityError(
            f"Another node changed the layer '{name}' itself, which a quantized copy of the model would not have: put "
            "that node behind Quantize Model (Lowbit)."
        )


@contextlib.contextmanager
def use_unpatched(patcher: comfy.model_patcher.ModelPatcher) -> Iterator[None]:
    """The model of `patcher` as it is under the object patches of whichever clone is loaded.

    Without this a patch that is in its place is taken for the model's own part of that name, and is lost.
    """
    put_back = {
        name: comfy.utils.set_attr(patcher.model, name, original)
        for name, original in patcher.object_patches_backup.items()
    }
    try:
        yield
    finally:
        for name, patch in put_back.items():
            if name in patcher.object_patches_backup:  # else core has unloaded the model in the meantime
                comfy.utils.set_attr(patcher.model, name, patch)


def _touched(model: torch.nn.Module) -> str | None:
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        replaced = forward is not None and getattr(forward, "__func__", None) is not type(module).forward
        if replaced and isinstance(module, OptimizedModule):
            continue
        if replaced or module._forward_hooks or module._forward_pre_hooks:
            return name
    return None


def _counterparts(old: torch.nn.Module, new: torch.nn.Module) -> dict[int, torch.nn.Module | None]:
    """By identity, what takes the place of each module of `old`: the one of its name, compiled or not."""
    targets = dict(new.named_modules())
    found: dict[int, torch.nn.Module | None] = {}
    for name, module in old.named_modules():
        if not isinstance(module, OptimizedModule):
            plain = ".".join(part for part in name.split(".") if part != _COMPILED)
            found[id(module)] = targets.get(plain)
    return found


@dataclass(frozen=True)
class _Kind:
    """How one kind of object is looked into, and made anew around other parts.

    Attributes:
        parts: what it refers to.
        shell: a new one, of its parts where it cannot be changed later.
        fill: puts the new parts in.
    """

    parts: Callable[[Any], Iterable[Any]]
    shell: Callable[[Any, Callable[[Any], Any]], Any]
    fill: Callable[[Any, Any, Callable[[Any], Any]], None] = lambda value, shell, new: None


def _function_parts(value: types.FunctionType) -> list[Any]:
    return [*(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__, vars(value)]


def _function_shell(value: types.FunctionType, new: Callable[[Any], Any]) -> types.FunctionType:
    closure = tuple(new(cell) for cell in value.__closure__) if value.__closure__ is not None else None
    return types.FunctionType(value.__code__, value.__globals__, value.__name__, None, closure)


def _fill_function(value: types.FunctionType, shell: types.FunctionType, new: Callable[[Any], Any]) -> None:
    shell.__defaults__ = new(value.__defaults__)
    shell.__kwdefaults__ = new(value.__kwdefaults__)
    shell.__qualname__, shell.__module__ = value.__qualname__, value.__module__
    vars(shell).update(new(vars(value)))


def _cell_parts(value: types.CellType) -> list[Any]:
    try:
        return [value.cell_contents]
    except ValueError:
        return []


def _fill_cell(value: types.CellType, shell: types.CellType, new: Callable[[Any], Any]) -> None:
    for content in _cell_parts(value):
        shell.cell_contents = new(content)


def _method(value: types.MethodType, new: Callable[[Any], Any]) -> Any:
    """The method of that name where it is the class's own: the new layer's class may have another."""
    owner, name = new(value.__self__), value.__func__.__name__
    if getattr(type(value.__self__), name, None) is value.__func__ and hasattr(owner, name):
        return types.MethodType(getattr(type(owner), name), owner)
    return types.MethodType(new(value.__func__), owner)


def _compiled(value: OptimizedModule, new: Callable[[Any], Any]) -> OptimizedModule:
    return OptimizedModule(new(value._orig_mod), value.dynamo_ctx)


def _fill_object(value: Any, shell: Any, new: Callable[[Any], Any]) -> None:
    vars(shell).update({name: new(part) for name, part in vars(value).items()})


_KINDS: tuple[tuple[type | tuple[type, ...], _Kind], ...] = (
    (
        dict,
        _Kind(dict.values, lambda v, new: copy.copy(v), lambda v, s, new: s.update({k: new(x) for k, x in v.items()})),
    ),
    (list, _Kind(iter, lambda v, new: copy.copy(v), lambda v, s, new: s.__setitem__(slice(None), [new(x) for x in v]))),
    (tuple, _Kind(iter, lambda v, new: tuple(new(x) for x in v) if type(v) is tuple else type(v)(*map(new, v)))),
    ((set, frozenset), _Kind(iter, lambda v, new: type(v)(new(x) for x in v))),
    (types.CellType, _Kind(_cell_parts, lambda v, new: types.CellType(), _fill_cell)),
    (types.FunctionType, _Kind(_function_parts, _function_shell, _fill_function)),
    (types.MethodType, _Kind(lambda v: [v.__self__, v.__func__], _method)),
    (
        functools.partial,
        _Kind(
            lambda v: [v.func, v.args, v.keywords],
            lambda v, new: functools.partial(new(v.func), *new(v.args), **new(v.keywords)),
        ),
    ),
    (OptimizedModule, _Kind(lambda v: [v._orig_mod], _compiled)),
)

_OBJECT = _Kind(lambda value: vars(value).values(), lambda value, new: copy.copy(value), _fill_object)


def _kind(value: Any) -> _Kind | None:
    """How `value` is looked into, or None where it is not: patchers hold models of their own."""
    if isinstance(value, (*_OPAQUE, comfy.model_patcher.ModelPatcher)):
        return None
    for classes, kind in _KINDS:
        if isinstance(value, classes):
            return kind
    return _OBJECT if hasattr(value, "__dict__") else None


class _Rebinder:
    def __init__(self, counterparts: dict[int, torch.nn.Module | None]) -> None:
        self._counterparts = counterparts
        self._made: dict[int, Any] = {}
        self._alive: list[Any] = []

    def rebound(self, value: Any, called: str) -> Any:
        """`value`, or what takes its place; `called` is what an error calls it."""
        reaching = self._reaching(value)
        try:
            return self._new(value, reaching)
        except CapabilityError:
            raise
        except Exception as error:
            raise CapabilityError(
                f"What another node put on the model ({called}) holds on to its unquantized layers and cannot be moved "
                f"to the quantized ones ({error}): put that node behind Quantize Model (Lowbit)."
            ) from error

    def _reaching(self, root: Any) -> set[int]:
        """The identities of all objects from which a layer of the old model is reached."""
        referrers: dict[int, list[int]] = {}
        seen, pending, layers = {id(root)}, [root], []
        while pending and len(seen) < _MOST_OBJECTS:
            value = pending.pop()
            if id(value) in self._counterparts:
                layers.append(id(value))
                continue
            kind = _kind(value)
            for part in kind.parts(value) if kind is not None else ():
                referrers.setdefault(id(part), []).append(id(value))
                if id(part) not in seen:
                    seen.add(id(part))
                    # Parts may be made for the asking: kept, so that no other object gets their identity.
                    self._alive.append(part)
                    pending.append(part)
        reaching: set[int] = set()
        while layers:
            for referrer in referrers.get(layers.pop(), ()):
                if referrer not in reaching:
                    reaching.add(referrer)
                    layers.append(referrer)
        return reaching

    def _new(self, value: Any, reaching: set[int]) -> Any:
        if id(value) in self._counterparts:
            counterpart = self._counterparts[id(value)]
            if counterpart is None:
                raise ValueError(f"the quantized model has no such {type(value).__name__}")
            return counterpart
        if id(value) not in reaching:
            return value
        if id(value) not in self._made:
            kind = _kind(value)
            assert kind is not None
            self._alive.append(value)
            shell = kind.shell(value, lambda part: self._new(part, reaching))
            self._made[id(value)] = shell
            kind.fill(value, shell, lambda part: self._new(part, reaching))
        return self._made[id(value)]
