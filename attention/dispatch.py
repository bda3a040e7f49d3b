"""Sends each attention call to the fastest backend that can take it within the error budget, and never to a wrong one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..kernels.measured import MeasuredNumbers
from . import checks
from .backends import BACKENDS, CORE, Backend
from .candidates import NEVER, AttentionInputs, Candidate, Policy, ShapePlan
from .environment import Environment, detect
from .masks import MaskMemory, normalized
from .planning import Planner
from .report import TIMED_CALLS, Report, Struck, Tally

log = logging.getLogger("lowbit.attention")

CHECKED_CALLS = 2
# Calls with inputs that are not finite say nothing of a backend; after this many the first calls count as seen.
UNJUDGED_CALLS = 32
# Where nobody says when a model call begins (plain PyTorch), one in so many lossy calls is compared.
COMPARED_EVERY = 256
# Successive multiples of it, modulo 1, spread evenly: each model call compares another block.
GOLDEN_RATIO = 0.6180339887
MAX_PLANS = 512
SAID_CHARACTERS = 200
GRADIENTS = "they need gradients, which the backends do not give"


class WrongOutput(Exception):  # noqa: N818
    """A backend gave something that is no attention output."""


class NotFinite(Exception):  # noqa: N818
    """A backend made NaN or Inf from finite inputs."""


class Dispatcher:
    """Chooses, calls, checks and counts. One per attention node; holds no tensor between sampling runs."""

    def __init__(
        self,
        policy: Policy,
        timings: MeasuredNumbers | None = None,
        backends: tuple[Backend, ...] = BACKENDS,
        environment: Callable[[torch.device], Environment] = detect,
    ):
        """backends and environment are the table and the probe; tests pass their own."""
        self.policy = policy
        self.report = Report()
        self.masks = MaskMemory()
        self.lossy_calls = 0
        self.planner = Planner(policy, self.report, timings, backends, environment)
        self._plans: dict[tuple, ShapePlan] = {}
        self._model_calls = 0
        self._told: set[tuple[str, str]] = set()

    def begin_run(self) -> None:
        """A sampling run starts: masks are looked at anew, and what ran out of memory gets another chance."""
        self.masks.forget()
        self.report.runs += 1
        if len(self._plans) > MAX_PLANS:
            self._plans.clear()
            self.report.forget_unused()
        for plan in list(self._plans.values()):
            temporary = [c for c in plan.candidates if c.struck and c.struck.temporary]
            for candidate in temporary:
                candidate.struck = None
            if temporary:
                plan.advance(self._model_calls)

    def end_run(self) -> None:
        """A sampling run is over: lets go of every tensor held."""
        self.masks.forget()

    def begin_model_call(self) -> None:
        """The model is about to be called once. Each shape on a lossy backend gets one call of it compared.

        In the model call in which a backend first takes a shape all of its calls are compared, which is every block.
        """
        self.masks.new_model_call()
        self._model_calls += 1
        spread = self._model_calls * GOLDEN_RATIO % 1
        for plan in list(self._plans.values()):
            seen, plan.seen = plan.seen, plan.current.tally.calls
            if plan.current.lossy and self._known(plan):
                plan.left = 1 + int(max(plan.seen - seen, 0) * spread)

    def bar_lossy(self, reason: str) -> list[str]:
        """Strikes off every lossy backend that has taken calls, for all shapes. Returns their names."""
        taken = [
            c for p in list(self._plans.values()) for c in p.candidates if c.lossy and c.tally.calls and not c.struck
        ]
        barred = sorted({candidate.backend for candidate in taken})
        self.planner.barred |= dict.fromkeys(barred, reason)
        for plan in list(self._plans.values()):
            for candidate in plan.candidates:
                if candidate.lossy and candidate.backend in barred and candidate.struck is None:
                    self._strike(plan, candidate, reason)
        return barred

    def unbar(self, names: list[str]) -> None:
        """Takes back `bar_lossy`: these backends were not to blame."""
        for name in names:
            reason = self.planner.barred.pop(name, None)
            for plan in list(self._plans.values()):
                for candidate in plan.candidates:
                    if candidate.backend == name and candidate.struck and candidate.struck.reason == reason:
                        self._pardon(candidate)
                        plan.advance(self._model_calls)

    def settings(self, device: torch.device) -> dict[str, Any]:
        """The head of a report: what was asked for and on what."""
        environment = self.planner.environment(device)
        return {
            "backend": self.policy.backend,
            "budget": self.policy.budget,
            "paired": list(self.policy.paired),
            "device": environment.gpu or environment.device_type,
            "compute_capability": environment.compute_capability,
            "torch": environment.torch,
            "packages": dict(environment.packages),
        }

    def run(self, inputs: AttentionInputs) -> torch.Tensor:
        """Attention of q over k and v.

        Returns (batch, q_len, heads * head_dim), or (batch, heads, q_len, head_dim) with heads_first.
        Raises CapabilityError when the policy says stop and the backend asked for cannot run.
        """
        q, k, v, mask, scale, exact, core, heads_first, core_exact, core_name, drop_mask = inputs
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            self.report.hand_on(GRADIENTS)
            return (core_exact or core)(False)
        if mask is not None and self.masks.masks_nothing(mask):
            mask, drop_mask = None, True
            inputs = inputs._replace(mask=mask, drop_mask=drop_mask)
            self.report.masks_dropped += 1
        key = (
            q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, scale, exact, core_name,
            core_exact is None, None if mask is None else (mask.shape, mask.dtype),
        )  # fmt: skip
        plan = self._plans.get(key)
        if plan is not None:
            plan.left -= 1
        if plan is None or plan.left == 0:
            return self._careful(plan or self._new_plan(key, inputs), inputs)
        candidate = plan.current
        kernel = candidate.kernel
        if kernel is None and not candidate.lossy:
            candidate.tally.calls += 1
            return (core if candidate.backend == CORE else core_exact or core)(drop_mask)
        try:
            if kernel is None:
                out = core(drop_mask)
            else:
                if not candidate.as_they_are:
                    contiguous = candidate.contiguous
                    q, k = checks.prepared(q, contiguous), checks.prepared(k, contiguous)
                    v = checks.prepared(v, contiguous)
                out = kernel(q, k, v, mask if mask is None else normalized(mask), scale)
                if out.shape != plan.out_shape:
                    raise WrongOutput(f"it gave {tuple(out.shape)} instead of {tuple(plan.out_shape)}")
        except Exception as error:
            self._strike_for(plan, candidate, error)
            return self._careful(plan, inputs)
        candidate.tally.calls += 1
        self.lossy_calls += candidate.lossy
        return out if heads_first or kernel is None else out.transpose(1, 2).reshape(plan.flat_shape)

    def _new_plan(self, key: tuple, inputs: AttentionInputs) -> ShapePlan:
        """A plan for this call, kept for the next ones; what failed while it was timed is struck off."""
        planned = self.planner.plan(inputs, self._model_calls, _capturing(inputs.q))
        plan = planned.plan
        if planned.keep:
            self._plans[key] = plan
        for candidate in plan.candidates:
            error = planned.failed.get(candidate.backend)
            if error is not None and candidate.kernel is not None:
                self._strike(plan, candidate, f"{_said(error)} while it was timed")
        return plan

    def _careful(self, plan: ShapePlan, inputs: AttentionInputs) -> torch.Tensor:
        """A checked call: timed while the backend is new, and done again with the next one when it is wrong."""
        capturing = _capturing(inputs.q)
        suspects: list[Candidate] = []
        mask = inputs.mask if inputs.mask is None else normalized(inputs.mask)
        plain = inputs._replace(mask=mask)
        while True:
            candidate = plan.current
            if candidate.kernel is None and not candidate.lossy:
                out = self._timed(candidate, plain, capturing)
                self._finish_core(plan, candidate, out, suspects, capturing)
                return out
            try:
                out = self._timed(candidate, plain, capturing)
                whole = _heads_first(out, candidate, plain)
                if whole.shape != plan.out_shape or whole.dtype != inputs.q.dtype:
                    raise WrongOutput(
                        f"it gave {tuple(whole.shape)} {whole.dtype} instead of {tuple(plan.out_shape)} {inputs.q.dtype}"
                    )
                if not capturing:
                    self._check(plan, candidate, plain, whole)
            except Exception as error:
                if isinstance(error, NotFinite):
                    suspects.append(candidate)
                self._strike_for(plan, candidate, error)
                continue
            candidate.tally.calls += 1
            self.lossy_calls += candidate.lossy
            plan.left = self._next_check(plan)
            as_it_is = inputs.heads_first or candidate.kernel is None
            return out if as_it_is else out.transpose(1, 2).reshape(plan.flat_shape)

    def _known(self, plan: ShapePlan) -> bool:
        """Whether the first calls of the current candidate are behind it."""
        return plan.checked >= CHECKED_CALLS + TIMED_CALLS or plan.attempts >= UNJUDGED_CALLS

    def _compares_all(self, plan: ShapePlan) -> bool:
        """Whether every call is compared: of a lossy backend held to a budget, in the model call in which it took over
        this shape, and until its first calls are behind it."""
        bounded = plan.current.lossy and plan.current.limit < float("inf")
        return bounded and self._model_calls > 0 and (plan.since == self._model_calls or not self._known(plan))

    def _next_check(self, plan: ShapePlan) -> int:
        """Calls until the next one that is checked; `begin_model_call` sets it for the calls of later model calls."""
        if not self._known(plan) or self._compares_all(plan):
            return 1
        return COMPARED_EVERY if plan.current.lossy and not self._model_calls else NEVER

    def _check(self, plan: ShapePlan, candidate: Candidate, inputs: AttentionInputs, out: torch.Tensor) -> None:
        """Raises NotFinite or WrongOutput when this output cannot be trusted. Between the checked calls and the last
        timed one nothing is looked at, so that timing does not wait for the GPU."""
        timing = CHECKED_CALLS <= plan.checked < CHECKED_CALLS + TIMED_CALLS
        if timing and not self._compares_all(plan):
            plan.checked += 1
            return
        if not checks.is_finite(out):
            if all(checks.is_finite(x) for x in inputs[:3]):
                raise NotFinite("it made NaN or Inf from finite inputs")
            plan.attempts += 1
            return
        plan.checked += 1
        error = self._error(plan.references, inputs, out) if candidate.lossy else None
        if error is None:
            return
        candidate.tally.error = max(error, candidate.tally.error or 0.0)
        if not error <= candidate.limit:
            raise WrongOutput(
                f"its error on this graph's tensors is {error:.2g}, over the budget of {candidate.limit:g}"
            )

    @staticmethod
    def _error(
        references: Sequence[Callable[..., torch.Tensor]], inputs: AttentionInputs, out: torch.Tensor
    ) -> float | None:
        """The relative error of an output against the first exact backend that gives a finite one, on a few heads.

        None where none does.
        """
        q, k, v, mask, scale = inputs[:5]
        q, k, v = (checks.prepared(x) for x in (q, k, v))
        tries = [(q, k, v, out)]
        if k.shape[1] == q.shape[1] and (mask is None or mask.shape[1] == 1):
            some = checks.some_heads
            tries.insert(0, (some(q), some(k), some(v), some(out)))
        for reference in references:
            for some_q, some_k, some_v, some_out in tries:
                try:
                    want = reference(some_q, some_k, some_v, mask, scale)
                except torch.OutOfMemoryError:
                    return None
                except RuntimeError:  # a kernel that does not take a view of some heads may take them all
                    continue
                if checks.is_finite(want):
                    return checks.relative_error(some_out, want)
                break
        return None

    def _finish_core(
        self, plan: ShapePlan, core: Candidate, out: torch.Tensor, suspects: list[Candidate], capturing: bool
    ) -> None:
        """Counts a call of ComfyUI's own, and clears backends of a NaN that ComfyUI's own makes too."""
        core.tally.calls += 1
        plan.checked += not capturing
        if suspects and not capturing and not checks.is_finite(out):
            for candidate in suspects:
                self._pardon(candidate)
            self.report.note(
                f"Attention over {plan.call} is not finite with any backend: the inputs or the mask make it so."
            )
            plan.advance(self._model_calls)
            plan.checked = CHECKED_CALLS
        plan.left = self._next_check(plan)

    def _pardon(self, candidate: Candidate) -> None:
        self.report.struck = [struck for struck in self.report.struck if struck is not candidate.struck]
        candidate.struck = None

    @staticmethod
    def _timed(candidate: Candidate, inputs: AttentionInputs, capturing: bool) -> torch.Tensor:
        """Runs the call; from the third on, until enough are known, its time is taken without waiting for the GPU."""
        tally: Tally = candidate.tally
        if capturing or tally.calls < CHECKED_CALLS or len(tally.times) >= TIMED_CALLS:
            return candidate.on(inputs)
        return tally.times.take(lambda: candidate.on(inputs), inputs.q.is_cuda)

    def _strike_for(self, plan: ShapePlan, candidate: Candidate, error: Exception) -> None:
        self._strike(plan, candidate, _said(error), temporary=isinstance(error, torch.OutOfMemoryError))

    def _strike(self, plan: ShapePlan, candidate: Candidate, reason: str, temporary: bool = False) -> None:
        """Takes a candidate off a plan for good, or for this run; tells the user once per backend and kind of reason."""
        candidate.struck = Struck(candidate.backend, plan.call, reason, temporary)
        self.report.strike(candidate.struck)
        plan.advance(self._model_calls)
        kind = (candidate.backend, " ".join(reason.split()[:2]))
        if kind not in self._told:
            self._told.add(kind)
            log.warning(
                "Attention backend %s is struck off for %s: %s. %s takes over.",
                candidate.backend, plan.call, reason, plan.current.backend,
            )  # fmt: skip


def _capturing(x: torch.Tensor) -> bool:
    """Whether calls on this tensor's device are being recorded into a CUDA graph, where nothing may be looked at."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _heads_first(out: torch.Tensor, candidate: Candidate, inputs: AttentionInputs) -> torch.Tensor:
    """An output as (batch, heads, length, head_dim): ComfyUI's own comes as the model wants it."""
    if candidate.kernel is not None or inputs.heads_first:
        return out
    return out.unflatten(-1, (inputs.q.shape[1], -1)).transpose(1, 2)


def _said(error: Exception) -> str:
    """What a backend's error says, for the report."""
    if isinstance(error, torch.OutOfMemoryError):
        return "it ran out of memory"
    if isinstance(error, (WrongOutput, NotFinite)):
        return str(error)
    lines = str(error).strip().splitlines()
    text = lines[0][:SAID_CHARACTERS] if lines else ""
    return f"it raised {type(error).__name__}: {text}"
