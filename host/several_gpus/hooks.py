"""What the node does around a sampling run: prepares the workers, has each forward split, and waits for them at the end."""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP

from ...attention.sequence_split import shares
from ...errors import MemoryBudgetError, WorkerError
from .. import model_copy
from ..in_front import seeing_free_memory
from .sending import NotSentError, call_inputs, call_options, check_model, encoded
from .split_families import CoreFamily
from .team import Part, Team
from .trial import Trial

log = logging.getLogger("lowbit.several_gpus")

KEY = "lowbit_several_gpus"
AUTO, SEQUENCE, CFG, BOTH = SPLITS = ("auto", "sequence", "cfg", "both")


@dataclass(frozen=True)
class _Call:
    """A forward for some of the processes: its inputs as they are, and encoded."""

    part: Part
    named: dict[str, Any]
    sent: Any


class DividingHooks:
    """The wrappers of one node; ComfyUI calls them around its own functions.

    Args:
        team: the workers.
        split: one of SPLITS.
        say: tells the user one sentence.
        eight_bits: whether keys and values travel in 8 bits.
    """

    def __init__(self, team: Team, split: str, say: Callable[[str], None], eight_bits: bool = False):
        self._team = team
        self._split = split
        self._eight_bits = eight_bits
        self._tell = say
        self._said: set[str] = set()
        self._model: str | None = None
        self._network: Any = None
        self._file = ""
        self._family: CoreFamily | None = None
        self._patches: dict[str, list[Any]] = {}

    def __deepcopy__(self, memo: dict) -> DividingHooks:
        """Clones of the model share the workers."""
        return self

    def start(self, patcher: Any) -> None:
        """The workers start while ComfyUI is at other nodes, unless what is on the model by now keeps it on one GPU."""
        # As ComfyUI puts them together for a run.
        own = {**patcher.model_options["transformer_options"], "wrappers": patcher.wrappers}
        try:
            check_model(patcher, {**patcher.model_options, "transformer_options": own})
            encoded([model_copy.describe(patcher, own), call_options(own, own.get("patches", {}))])
            self._team.start(patcher.model, encoded(model_copy.file_of(patcher)))
        except (NotSentError, WorkerError, OSError) as error:
            log.debug("No worker starts before the run: %s", error)

    def outer_sample(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One sampling run; one that cannot go to other GPUs runs on this one."""
        guider: Any = executor.class_obj  # type: ignore[attr-defined]
        self._said.clear()
        self._model = None
        try:
            self._prepare(guider.model_patcher, guider.model_options)
        except NotSentError as error:
            self._say(str(error))
        try:
            out = executor(*args, **kwargs)
            if self._model is not None:
                self._team.settle()
            return out
        finally:
            self._model, self._network, self._patches = None, None, {}

    def calc_cond_batch(
        self, executor: Callable[..., Any], model: Any, conds: Any, x_in: Any, timestep: Any, model_options: Any
    ) -> Any:
        """One step: where prompts go to different GPUs, ComfyUI is to batch them as if each had a GPU to itself."""
        halves = self._model is not None and self._halves()
        with seeing_free_memory(model.current_patcher, 2) if halves else contextlib.nullcontext():
            return executor(model, conds, x_in, timestep, model_options)

    def diffusion_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """One forward, by all."""
        if self._model is None or torch.compiler.is_compiling():
            return executor(*args, **kwargs)
        if executor.class_obj is not self._network:
            self._say_once(
                "Several GPUs: the second model of this run, which has one for each prompt, runs on one GPU."
            )
            return executor(*args, **kwargs)
        names = tuple(inspect.signature(executor.class_obj.forward).parameters)
        named = dict(zip(names, args, strict=False)) | kwargs
        try:
            by_prompt = self._by_prompt(named)
            trial = self._trial(executor.class_obj, named, by_prompt)
            calls = self._calls(named, by_prompt, self._team.counts(by_prompt)[0] if trial is None else trial.count)
        except NotSentError as error:
            self._say(str(error))
            return executor(*args, **kwargs)
        positional = names[: len(args)]

        def forward(own: dict[str, Any]) -> Any:
            return executor(
                *(own[name] for name in positional),
                **{name: value for name, value in own.items() if name not in positional},
            )

        def run() -> Any:
            return self._run(executor.class_obj, calls, forward)

        parts = [call.part for call in calls]
        try:
            if trial is None or trial.settled:
                return self._team.forward(run, parts)
            out, seconds = self._team.forward(lambda: _timed(run, self._team.devices[0]), parts)
            trial.took(seconds)
            return out
        except Exception as error:
            no_memory = isinstance(error, MemoryBudgetError) or comfy.model_management.is_oom(error)
            if trial is None or not (no_memory and trial.failed()):
                raise
        # Not above, where the error still holds what the forward has made.
        return self.diffusion_model(executor, *args, **kwargs)

    def _by_prompt(self, named: Mapping[str, Any]) -> bool:
        """Whether each half of the processes takes one of the two prompts of this call."""
        if self._halves() and len(_chunks(named)) > 1:
            return True
        if self._split == CFG:
            self._say_once("ComfyUI could not batch the prompts of this run: its tokens are split instead.")
        return False

    def _trial(self, network: Any, named: Mapping[str, Any], by_prompt: bool) -> Trial | None:
        """Of how many processes a call like this is the fastest; None where the user has said it, or there is no choice."""
        counts = self._team.counts(by_prompt)
        if self._split != AUTO or len(counts) < 2:
            return None
        family = self._family
        assert family is not None
        blocks, exact = len(getattr(network, family.blocks)), model_copy.is_exact_now(named["transformer_options"])
        size = ", ".join("x".join(map(str, shape)) for shape in _latent_shapes(named))
        what = (
            f"{self._file}, {blocks} blocks; {size}; by prompt: {by_prompt}; 8 bits: {self._eight_bits}; exact: {exact}"
        )
        return self._team.trial(what, counts)

    def _calls(self, named: dict[str, Any], by_prompt: bool, count: int) -> list[_Call]:
        """One call for `count` processes, or one for each prompt."""
        family = self._family
        assert family is not None
        parts, chunks = self._team.parts(by_prompt, count), _chunks(named)
        if not by_prompt:
            return [self._call(family, named, parts[0])]
        rows, per_chunk = len(named["x"]), len(named["x"]) // len(chunks)
        first = shares(len(chunks), (1.0, 1.0))[0]
        halves = slice(0, first), slice(first, len(chunks))
        return [
            self._call(family, _rows(named, rows, per_chunk, half), part)
            for part, half in zip(parts, halves, strict=True)
        ]

    def _call(self, family: CoreFamily, named: dict[str, Any], part: Part) -> _Call:
        options = named["transformer_options"]
        sent = {
            "inputs": call_inputs(family, named),
            "options": call_options(options, self._patches),
            "exact": model_copy.is_exact_now(options),
        }
        return _Call(replace(part, eight_bits=self._eight_bits), named, encoded(sent))

    def _run(self, network: Any, calls: list[_Call], forward: Callable[[dict[str, Any]], Any]) -> Any:
        """Every call by its processes, this one's last so that the others are at work meanwhile."""
        assert self._model is not None
        for call in reversed(calls):
            self._team.send(self._model, call.sent, call.part)
        own = calls[0]
        split = self._team.split(network, self._family, own.part)
        out = forward(own.named) if split is None else split.run(lambda: forward(own.named))
        if split is not None and split.reason is not None:
            self._say_once(f"Several GPUs: a step of this model runs on one GPU, since {split.reason}.")
        results = [out]
        for call in calls[1:]:
            rows = len(call.named["x"])
            results.append(self._team.take_over(out.new_empty(rows, *out.shape[1:]), call.part))
        return out if len(results) == 1 else torch.cat(results)

    def _halves(self) -> bool:
        """Whether each half of the processes takes one of two prompts, where ComfyUI batches them."""
        team = self._team
        if self._split == SEQUENCE or not team.counts(True):
            return False
        return self._split != AUTO or len(set(team.speeds)) == 1

    def _say(self, what: str) -> None:
        self._say_once(f"Several GPUs: {what} cannot be sent to other GPUs, so this run uses one.")

    def _say_once(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            self._tell(sentence)

    def _prepare(self, patcher: Any, options: Mapping[str, Any]) -> None:
        self._family, self._network = check_model(patcher, options), patcher.model.diffusion_model
        own = options["transformer_options"]
        self._patches = {name: list(listed) for name, listed in own.get("patches", {}).items()}
        wrappers = own.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {})
        if KEY in wrappers:  # what is outside sees the whole forward, what is inside would see a part
            wrappers[KEY] = wrappers.pop(KEY)
        version = model_copy.version(patcher, own)
        self._file = Path(model_copy.file_of(patcher)[1]).name
        self._model = self._team.prepare(patcher.model, version, lambda: encoded(model_copy.describe(patcher, own)))


def _chunks(named: Mapping[str, Any]) -> list[int]:
    """The prompts that ComfyUI has batched in a call."""
    return named["transformer_options"].get("cond_or_uncond") or [0]


def _latent_shapes(named: Mapping[str, Any]) -> Iterator[tuple[int, ...]]:
    """Of what a call makes most of its tokens of: its latent, references, controls. A text is of another length in every run."""
    for value in named.values():
        for part in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(part, torch.Tensor) and part.ndim > 3:
                yield tuple(part.shape)


def _timed(run: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What comes of it, and the seconds until the device has it."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    began = now()
    return run(), now() - began


def _rows(named: Mapping[str, Any], rows: int, per_chunk: int, half: slice) -> dict[str, Any]:
    """A batched call's inputs for some of its prompts: what has a row for each is cut, the rest is for all."""
    first, last = half.start * per_chunk, half.stop * per_chunk

    def cut(value: Any) -> Any:
        if isinstance(value, list):
            return [cut(item) for item in value]
        has_rows = isinstance(value, torch.Tensor) and value.ndim and len(value) == rows
        return value[first:last] if has_rows else value

    options = named["transformer_options"]
    own = {**options, "cond_or_uncond": options["cond_or_uncond"][half]}
    return {name: cut(value) for name, value in named.items() if name != "transformer_options"} | {
        "transformer_options": own
    }
