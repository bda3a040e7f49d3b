"""Decides which backends can take calls of one shape, and in which order they are tried."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from ..errors import CapabilityError
from ..kernels.measured import MeasuredNumbers
from ..kernels.runtime import dtype_name
from . import checks, measure
from .backends import CORE, CORE_EXACT, ERROR_LIMITS, AttentionCall, Backend, Reason, backend_names, by_name
from .candidates import AUTO, AttentionInputs, Candidate, Policy, ShapePlan
from .environment import Environment
from .masks import normalized
from .report import Report

TIMINGS_FILE = "attention_timings.json"
"""Name of the file of milliseconds by backend."""


class NewPlan(NamedTuple):
    """A new plan, the candidates that failed while they were timed, and whether it holds for later calls too."""

    plan: ShapePlan
    failed: dict[str, Exception]
    keep: bool


class _Case(NamedTuple):
    """One call as the planner sees it: its inputs with a mask of four dimensions, its shape, and where it runs."""

    inputs: AttentionInputs
    call: AttentionCall
    budget: str
    environment: Environment
    capturing: bool

    @property
    def own(self) -> str:
        """ComfyUI's own attention that this call may end at: never a lossy kernel when it must be exact."""
        return CORE_EXACT if self.budget == "exact" and self.inputs.core_exact is not None else CORE


class Planner:
    """Makes the plan of each shape from the policy, the table of backends, and the timings."""

    def __init__(
        self,
        policy: Policy,
        report: Report,
        timings: MeasuredNumbers | None,
        backends: tuple[Backend, ...],
        environment: Callable[[torch.device], Environment],
    ):
        self.policy = policy
        self.report = report
        self.barred: dict[str, str] = {}
        self.backends = by_name(backends)
        self.environment = environment
        self.timings = timings or MeasuredNumbers(None, TIMINGS_FILE)

    def plan(self, inputs: AttentionInputs, since: int, capturing: bool) -> NewPlan:
        """The candidates for calls like this one: what was asked for by name, else those that are faster here than
        ComfyUI's own attention, fastest first."""
        mask = inputs.mask if inputs.mask is None else normalized(inputs.mask)
        inputs = inputs._replace(mask=mask)
        case = _Case(
            inputs,
            AttentionCall.of(inputs.q, inputs.k, inputs.v, mask, inputs.scale),
            "exact" if inputs.exact else self.policy.effective_budget,
            self.environment(inputs.q.device),
            capturing,
        )
        usable = self._usable(case) if _well_formed(inputs) else {}
        asked = [name for name in usable if name == self.policy.backend]
        times, failed = self._times(case, usable, timing=not asked) if usable else ({}, {})
        names = [*asked, *self._faster(case, usable, times), *(name for name in failed if name in usable)]
        candidates = [usable[name] for name in dict.fromkeys(names)]
        self._say_if_never_run(case, candidates)
        references = [candidate.kernel for candidate in usable.values() if not candidate.lossy and candidate.kernel]
        plan = ShapePlan(case.call, [*candidates, *self._last_resorts(case)], references, since)
        return NewPlan(plan, failed, keep=bool(asked) or times is not None)

    def _last_resorts(self, case: _Case) -> list[Candidate]:
        """ComfyUI's own attention: its kernel unless that is lossy and the call exact, then its exact one."""
        lossy = case.inputs.core_exact is not None
        names = [case.own] if case.own == CORE_EXACT or not lossy else [CORE, CORE_EXACT]
        names = [name for name in names if not (lossy and name in self.barred)]
        limit = ERROR_LIMITS[case.budget]
        return [
            Candidate(name, self.report.tally(name, case.call, case.budget), None, lossy and name == CORE, limit)
            for name in names
        ]

    def _say_if_never_run(self, case: _Case, candidates: list[Candidate]) -> None:
        if candidates and case.environment.device_type == "cuda":
            first = self.backends[candidates[0].backend]
            if case.environment.compute_capability not in first.tested_on:
                self.report.note(f"{first.name}: not run by us on cc {case.environment.compute_capability}.")

    def _usable(self, case: _Case) -> dict[str, Candidate]:
        """Every backend that can take the call, in the table's order; why the one asked for cannot is noted."""
        usable: dict[str, Candidate] = {}
        inputs, call = case.inputs, case.call
        tensors = (checks.prepared(inputs.q), checks.prepared(inputs.k), checks.prepared(inputs.v))
        for backend in self.backends.values():
            limit = self._limit(backend, case)
            reason = self._refusal(backend, case, tensors, limit)
            if reason is None:
                try:
                    kernel = backend.bind(case.environment)
                except Exception as error:
                    reason = Reason(f"it cannot be set up ({error})", setup=True)
            if reason is not None:
                self._decline(backend, reason)
                continue
            tally, lossy = self.report.tally(backend.name, call, case.budget), backend.error_class != "exact"
            usable[backend.name] = Candidate(
                backend.name, tally, kernel, lossy, limit, backend.contiguous, backend.as_they_are
            )
        return usable

    def _limit(self, backend: Backend, case: _Case) -> float:
        """The error a backend is held to: none when it was asked for by name, its own class when it is paired."""
        if not case.inputs.exact and backend.name == self.policy.backend:
            return float("inf")
        if case.budget == "exact":
            return ERROR_LIMITS["exact"]
        return ERROR_LIMITS[backend.error_class if backend.name in self.policy.paired else case.budget]

    def _refusal(
        self, backend: Backend, case: _Case, tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], limit: float
    ) -> Reason | None:
        """Why a backend cannot take the call, None when it can."""
        reason = backend.why_not_here(case.environment) or backend.why_not(case.call, case.environment)
        if reason is not None:
            return reason
        if backend.name in self.barred:
            return Reason(self.barred[backend.name])
        if not backend.accepts(*tensors, case.inputs.mask):
            return Reason("torch has no such kernel for these tensors")
        if ERROR_LIMITS[backend.error_class] > limit:
            return Reason(f"its error class is {backend.error_class} and this call must be {case.budget}")
        return None

    def _decline(self, backend: Backend, reason: Reason) -> None:
        if backend.name not in (self.policy.backend, *self.policy.paired):
            return
        if backend.name == self.policy.backend and self.policy.stop and reason.setup:
            raise CapabilityError(cannot_run(backend.name, str(reason)))
        key = (backend.name, str(reason))
        self.report.declined[key] = self.report.declined.get(key, 0) + 1

    def _times(
        self, case: _Case, usable: dict[str, Candidate], timing: bool
    ) -> tuple[dict[str, float] | None, dict[str, Exception]]:
        """Milliseconds of ComfyUI's own attention and of each usable backend, and those that failed while they were timed.

        Timings are kept on disk when all of them could be taken; a group of shapes known there is not timed again. None
        where they are not known and cannot be taken now. timing: take them. Nothing is timed but on an NVIDIA GPU.
        """
        key, where = timing_key(case), case.environment.fingerprint()
        known = self.timings.get(where, key)
        if known is not None and {case.own, *usable} <= known.keys():
            return known, {}
        if case.environment.device_type != "cuda" or not timing:
            return {}, {}
        if case.capturing:
            return None, {}
        times, failed = self._timed_now(case, usable)
        if not failed:
            self.timings.put(where, {key: times})
        return times, failed

    @staticmethod
    def _timed_now(case: _Case, usable: dict[str, Candidate]) -> tuple[dict[str, float], dict[str, Exception]]:
        """Times everybody on this call's tensors, backends on a part of a large call's heads."""
        inputs = case.inputs
        part, share = _part_of(inputs, case.call)
        calls = {name: partial(candidate.on, part) for name, candidate in usable.items()}
        shares = dict.fromkeys(calls, share)
        return measure.milliseconds({case.own: partial(inputs.own, case.own), **calls}, inputs.q.device, shares)

    @staticmethod
    def _faster(case: _Case, usable: dict[str, Candidate], times: dict[str, float] | None) -> list[str]:
        """The backends that are faster than ComfyUI's own attention, fastest first."""
        times = times or {}
        for name, candidate in usable.items():
            candidate.tally.earlier_ms = times.get(name)
        own_ms = times.get(case.own, float("inf"))
        return sorted((name for name in usable if times.get(name, own_ms) < own_ms), key=times.__getitem__)


def _well_formed(inputs: AttentionInputs) -> bool:
    """Whether these are plain attention inputs at all; whatever is not goes to ComfyUI's own untouched."""
    q, k, v, mask = inputs[:4]
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        return False
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        return False
    if mask is None:
        return True
    wanted = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    fits = mask.ndim == 4 and all(have in (1, want) for have, want in zip(mask.shape, wanted, strict=True))
    return fits and mask.device == q.device and mask.dtype in (torch.bool, q.dtype)


LARGE_CALL = 4e12
"""Operations of a call past which backends are timed on some of its heads: 7 ms at what cuDNN reaches on an H200."""
GROUPS_PER_DOUBLING = 4


def _part_of(inputs: AttentionInputs, call: AttentionCall) -> tuple[AttentionInputs, float]:
    """The inputs on enough of their heads to fill a GPU, and which share of all that is."""
    operations = 4.0 * call.batch * call.heads * call.q_len * call.kv_len * call.head_dim
    mask = inputs.mask
    if operations <= LARGE_CALL or call.kv_heads != call.heads or (mask is not None and mask.shape[1] != 1):
        return inputs, 1.0
    heads = max(math.ceil(call.heads * LARGE_CALL / operations), 1)
    q, k, v = (x[:, :heads] for x in inputs[:3])
    return inputs._replace(q=q, k=k, v=v), heads / call.heads


def _group(length: int) -> str:
    """The group of lengths that share their timings: within a fifth of each other."""
    return f"2^{round(math.log2(length) * GROUPS_PER_DOUBLING) / GROUPS_PER_DOUBLING:g}"


def timing_key(case: _Case) -> str:
    """Everything about a call that its time depends on; the machine's part is `Environment.fingerprint`."""
    inputs, call = case.inputs, case.call
    layout = "tokens first" if inputs.q.stride(1) < inputs.q.stride(2) else "heads first"
    out = "heads first" if inputs.heads_first else "tokens first"
    scale = "" if inputs.scale is None else ", scaled"
    own = CORE_EXACT if case.own == CORE_EXACT else inputs.core_name
    return (
        f"{call.batch} x {call.heads}/{call.kv_heads} heads, {_group(call.q_len)} x {_group(call.kv_len)} tokens, "
        f"head dim {call.head_dim}, {dtype_name(call.dtype)}, mask {_mask_shape(inputs.mask)}, "
        f"{layout} in, {out} out{scale}, budget {case.budget}, beside {own}"
    )


def _mask_shape(mask: torch.Tensor | None) -> str:
    """Along which dimensions a mask has values of its own, and of which dtype."""
    if mask is None:
        return "none"
    dimensions = "bhqk"
    kept = "".join(name for name, size in zip(dimensions, mask.shape, strict=True) if size > 1)
    return f"{kept} {dtype_name(mask.dtype)}"


def cannot_run(name: str, reason: str) -> str:
    """The one sentence for a backend asked for by name that cannot run."""
    return f"The attention backend {name} cannot run: {reason}. Choose another one, or let it fall back."


def check_named(policy: Policy, environment: Environment) -> str | None:
    """Why the backend the policy names cannot run on this machine, None when it can or none is named.

    Raises CapabilityError when the policy says stop, and for a name that is no backend.
    """
    if policy.backend == AUTO:
        return None
    backend = by_name().get(policy.backend)
    if backend is None:
        raise CapabilityError(
            f"There is no attention backend {policy.backend}; choose one of {', '.join(backend_names())}."
        )
    reason = backend.why_not_here(environment)
    if reason is None:
        return None
    if policy.stop:
        raise CapabilityError(cannot_run(policy.backend, str(reason)))
    return cannot_run(policy.backend, str(reason))
