"""What the memory manager does around a sampling run: releases what is in its way, watches steps, saves one that runs out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import comfy.sampler_helpers

from ...errors import MemoryBudgetError
from ...memory.decisions import clears_now, runs_one_at_a_time
from ...memory.policies import AUTO, EVERY, OFF, ON, Settings
from ..in_front import seeing_free_memory
from ..sampling_state import restorer
from .fetching import BlockFetcher, blocks_of
from .pages import part_limit
from .preflight import check_sampling
from .release import manage_prompt
from .room import again_after_oom, raise_other, release_all_but, release_for, release_part
from .session import session, where

KEY = "lowbit_memory"
_RELEASED_FRACTION = 0.25


class MemoryHooks:
    """The wrappers of one manager node; ComfyUI calls them around its own functions."""

    def __init__(self, settings: Settings, node_id: str | None):
        self.settings = settings
        self.node_id = node_id
        self._one_at_a_time: dict[Any, bool] = {}
        self.fetcher = BlockFetcher(settings.row.fetches_ahead)
        self._forced = False
        self._step = (0, 0)
        self._cleared = False
        self._returning = 0
        self._working = 0.0
        self._beside: list[Any] = []

    def __deepcopy__(self, memo: dict) -> MemoryHooks:
        """Clones for other GPUs share the settings and the run."""
        return self

    def outer_sample(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One sampling run, from loading to the last step."""
        self._one_at_a_time.clear()
        self._forced = False
        self._step = (0, 0)
        self._cleared, self._returning = False, 0
        patcher = executor.class_obj.model_patcher  # type: ignore[attr-defined]
        manage_prompt(self.node_id, self.settings.limit_bytes)
        out = executor(*args, **kwargs)
        sample = session().observe("sampled")
        session().passed((type(patcher.model).__name__, tuple(args[0].shape), "sampled"), sample, thorough=True)
        return out

    def prepare_sampling(
        self, executor: Callable[..., Any], model: Any, noise_shape: Any, conds: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """The load: refused when it cannot fit, after a release, and done again with less if it runs out."""
        name = type(model.model).__name__
        session().observe("load")
        batched, single = comfy.sampler_helpers.estimate_memory(model, noise_shape, conds)
        check_sampling(model, noise_shape, single)
        apart = self.settings.sequential == ON or batched > session().limit.budget
        working = self._working = single if apart else batched
        additional, _ = comfy.sampler_helpers.get_additional_models(conds, model.model_dtype())
        keep = self._beside = [*additional, *model.get_nested_additional_models(), *model.model_patches_models()]
        release_for(self.settings.row.release_before_sampling, model, working, keep, name)
        reserve = [self._reserved_from_weights()]

        def load() -> Any:
            with _more_reserved(reserve[0]):
                return executor(model, noise_shape, conds, *args, **kwargs)

        def make_room() -> str:
            model.detach()
            release_all_but(keep, f"loading {name}")
            reserve[0] += _RELEASED_FRACTION * session().limit.budget
            return "everything else left the GPU, and a quarter of the budget is kept free of weights"

        out = again_after_oom(load, make_room, f"loading {name}")
        self._beside = []
        session().observe("loaded")
        return out

    def sampler_sample(
        self,
        executor: Callable[..., Any],
        guider: Any,
        sigmas: Any,
        extra_args: Any,
        callback: Any,
        *args: Any,
        **kw: Any,
    ) -> Any:
        """The steps: measures after each, and clears when it is due."""
        steps = len(sigmas) - 1
        self._step = (0, steps)
        began = [time.perf_counter()]
        # Steps are compared within a run; across runs `outer_sample` compares its ends.
        phase = (*where(), tuple(args[0].shape), "step")

        def after_step(step: int, *values: Any, **named: Any) -> Any:
            out = None if callback is None else callback(step, *values, **named)
            done = time.perf_counter()
            self._step = (step + 1, steps)
            measures = session().ledger.may_measure_step()
            if measures:
                session().passed(phase, session().observe("sampling", step + 1, steps))
            measured = time.perf_counter()
            session().ledger.stepped(done - began[0], measured - done)
            if measures or self.settings.step_clearing == EVERY:
                self._clear_if_due(step + 1)
            began[0] = time.perf_counter()
            return out

        return executor(guider, sigmas, extra_args, after_step, *args, **kw)

    def calc_cond_batch(
        self, executor: Callable[..., Any], model: Any, conds: Any, x_in: Any, timestep: Any, model_options: Any
    ) -> Any:
        """The model calls of one step (of one context window): one at a time if need be, and once more after an error."""
        prompts = sum(cond is not None for cond in conds)
        if "multigpu_clones" in model_options:
            return self._on_several_gpus(lambda: executor(model, conds, x_in, timestep, model_options))
        restore = restorer(model_options.get("transformer_options"))

        def run() -> Any:
            apart = self._runs_one_at_a_time(model, x_in, prompts)
            # Core batches as many prompts as it believes to fit.
            with seeing_free_memory(model.current_patcher, 0) if apart else contextlib.nullcontext():
                return executor(model, conds, x_in, timestep, model_options)

        def make_room() -> str:
            restore()
            patcher = model.current_patcher
            keep = [patcher, *patcher.get_nested_additional_models(), *patcher.model_patches_models()]
            left = release_all_but(keep, what).names
            streamed = release_part(patcher, _RELEASED_FRACTION * session().limit.budget)
            self._forced, self.fetcher.enabled = True, False
            done = [f"{', '.join(left)} left the GPU" if left else "idle memory was given back"]
            done += [f"{streamed / 2**20:,.0f} MiB of weights stream from now on"] if streamed else []
            done += ["prompts run one at a time from here on"] if prompts > 1 else []
            return ", ".join(done)

        what = self._step_text()
        out = again_after_oom(run, make_room, what)
        if "context_handler" in model_options and session().ledger.may_measure_step():
            began = time.perf_counter()
            sample = session().observe("window", *self._step)
            session().passed((*where(), tuple(x_in.shape), prompts, "window"), sample)
            session().ledger.measured(time.perf_counter() - began)
        return out

    def _on_several_gpus(self, run: Callable[[], Any]) -> Any:
        """One step by core's threads, one a GPU: not repeated, since what the others had done would be taken for the next step's."""
        if self.settings.sequential_cfg == ON:
            session().say("sequential_cfg does nothing here: ComfyUI splits the prompts over several GPUs.")
        try:
            return run()
        except Exception as error:
            raise_other(error)
            raise MemoryBudgetError(
                f"{self._step_text()} ran out of memory on one of several GPUs, where no step is done again: choose a smaller "
                "format for the model, a smaller picture, or one GPU."
            ) from None

    def _step_text(self) -> str:
        return f"step {self._step[0] + 1} of {self._step[1]}"

    def loaded(self, patcher: Any, *details: Any) -> None:
        """After core has prepared a model: with dynamic VRAM, weights past the policy's share are not kept on the GPU."""
        blocks = blocks_of(getattr(patcher.model, "diffusion_model", None)) if self.fetcher.enabled else ()
        row = self.settings.row
        self.fetcher.fits = part_limit(patcher, row.resident_fraction, self._working, self._beside, blocks)

    def _reserved_from_weights(self) -> float:
        fraction = self.settings.row.resident_fraction
        return (1 - fraction) * session().limit.budget if session().device.holds_models else 0.0

    def _clear_if_due(self, step: int) -> None:
        settings, current = self.settings, session()
        if settings.step_clearing == OFF:
            return
        reading = current.device.read()
        budget = current.limit.budget_at(reading)
        room = budget - reading.reserved
        fraction = settings.row.clearing_fraction
        if self._cleared:
            self._cleared, self._returning = False, max(self._returning, reading.idle)
        choice, every = settings.step_clearing, settings.every
        if clears_now(choice, every, step, reading, room, budget, fraction, self._returning):
            began = time.perf_counter()
            current.device.clear()
            self._cleared = True
            current.ledger.run.clearings += 1
            current.ledger.run.clearing_seconds += time.perf_counter() - began

    def _runs_one_at_a_time(self, model: Any, x_in: Any, prompts: int) -> bool:
        if self._forced or prompts < 2:
            return self._forced
        key = (tuple(x_in.shape), prompts)
        if key not in self._one_at_a_time:
            shape = list(x_in.shape)
            choice = self.settings.sequential
            # Without a GPU there is nothing to save; what was asked for is done all the same.
            idle = choice == AUTO and not session().device.holds_models
            self._one_at_a_time[key] = not idle and runs_one_at_a_time(
                choice,
                prompts,
                weights=int(model.current_patcher.model_size()) if choice == AUTO else 0,
                single=int(model.memory_required(shape)),
                batched=int(model.memory_required([shape[0] * prompts, *shape[1:]])),
                budget=session().limit.budget - session().limit.kept_free,
            )
            if self._one_at_a_time[key]:
                session().ledger.note("Prompts ran one at a time (sequential CFG).")
        return self._one_at_a_time[key]


@contextlib.contextmanager
def _more_reserved(nbytes: float) -> Iterator[None]:
    """Core loads weights up to its reserve: for the length of a load that is larger."""
    before = comfy.model_management.EXTRA_RESERVED_VRAM
    comfy.model_management.EXTRA_RESERVED_VRAM = before + nbytes
    try:
        yield
    finally:
        comfy.model_management.EXTRA_RESERVED_VRAM = before
