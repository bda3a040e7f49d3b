"""Sends each attention call to the fastest backend that can take it within the error budget, and never to a wrong one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..errors import CapabilityError
from . import checks, measure, ranking
from .backends import BACKENDS, CORE, ERROR_LIMITS, AttentionCall, Backend, Reason, backend_names, by_name
from .environment import Environment, detect
from .masks import MaskMemory, normalized
from .plan import AUTO, MEASURED, Candidate, Core, Plan, Policy, Request
from .report import TIMED_CALLS, Report, Struck, Tally
from .timing_cache import TimingCache

log = logging.getLogger("lowbit.attention")

CHECKED_CALLS = 2
PAIRED_MIN_TOKENS = 1024


class WrongOutput(Exception):  # noqa: N818
    """A backend gave something that is no attention output."""


class NotFinite(Exception):  # noqa: N818
    """A backend made NaN or Inf from finite inputs."""


class Dispatcher:
    """Chooses, calls, checks and counts. One per attention node; holds no tensor between sampling runs."""

    def __init__(
        self,
        policy: Policy,
        timings: TimingCache | None = None,
        backends: tuple[Backend, ...] = BACKENDS,
        environment: Callable[[torch.device], Environment] = detect,
        ranks: tuple[ranking.Rank, ...] = ranking.RANKS,
    ):
        """backends, environment and ranks are the tables and the probe; tests pass their own."""
        self.policy = policy
        self.report = Report()
        self.masks = MaskMemory()
        self.lossy_calls = 0
        self._timings = timings or TimingCache(None)
        self._backends = by_name(backends)
        self._environment = environment
        self._ranks = ranks
        self._plans: dict[tuple, Plan] = {}
        self._barred: dict[str, str] = {}
        self._told: set[tuple[str, str]] = set()

    def begin_run(self) -> None:
        """A sampling run starts: masks are looked at anew, and what ran out of memory gets another chance."""
        self.masks.forget()
        self.report.runs += 1
        for plan in self._plans.values():
            temporary = [c for c in plan.candidates if c.struck and c.struck.temporary]
            for candidate in temporary:
                self._pardon(candidate)
            if temporary:
                plan.advance()

    def end_run(self) -> None:
        """A sampling run is over: lets go of every tensor held."""
        self.masks.forget()

    def bar_lossy(self, reason: str) -> list[str]:
        """Strikes off every lossy backend that has taken calls, for all shapes. Returns their names."""
        barred = sorted(
            {
                c.backend
                for p in self._plans.values()
                for c in p.candidates
                if c.lossy and c.tally.calls and not c.struck
            }
        )
        self._barred |= dict.fromkeys(barred, reason)
        for plan in self._plans.values():
            for candidate in plan.candidates:
                if candidate.backend in barred and candidate.struck is None:
                    self._strike(plan, candidate, reason)
        return barred

    def unbar(self, names: list[str]) -> None:
        """Takes back `bar_lossy`: these backends were not to blame."""
        for name in names:
            reason = self._barred.pop(name, None)
            for plan in self._plans.values():
                for candidate in plan.candidates:
                    if candidate.backend == name and candidate.struck and candidate.struck.reason == reason:
                        self._pardon(candidate)
                        plan.advance()

    def settings(self, device: torch.device) -> dict[str, Any]:
        """The head of a report: what was asked for and on what."""
        environment = self._environment(device)
        return {
            "backend": self.policy.backend,
            "budget": self.policy.budget,
            "paired": self.policy.paired,
            "device": environment.gpu or environment.device_type,
            "compute_capability": environment.compute_capability,
            "torch": environment.torch,
            "packages": dict(environment.packages),
        }

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        exact: bool,
        core: Core,
        heads_first: bool = False,
    ) -> torch.Tensor:
        """Attention of q over k and v.

        q: (batch, heads, q_len, head_dim); k, v: (batch, kv_heads, kv_len, head_dim); any strides. mask: 2 to 4
        dimensions, bool or added. scale: None for head_dim ** -0.5. exact: only backends of the exact class. core: the
        last resort. Returns (batch, q_len, heads * head_dim), or (batch, heads, q_len, head_dim) with heads_first.
        Raises CapabilityError when the policy says stop and the backend asked for cannot run.
        """
        drop_mask = False
        if mask is not None and self.masks.masks_nothing(mask):
            mask, drop_mask = None, True
            self.report.masks_dropped += 1
        key = (
            q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, scale, exact,
            None if mask is None else (mask.shape, mask.dtype),
        )  # fmt: skip
        plan = self._plans.get(key)
        if plan is None or not plan.settled:
            request = Request(q, k, v, mask, scale, exact, core, drop_mask, heads_first)
            if plan is None:
                plan = self._plans[key] = self._new_plan(request)
            return self._careful(plan, request)
        candidate = plan.current
        kernel = candidate.kernel
        if kernel is None:
            candidate.tally.calls += 1
            return core(drop_mask)
        contiguous = candidate.contiguous
        q, k, v = checks.prepared(q, contiguous), checks.prepared(k, contiguous), checks.prepared(v, contiguous)
        try:
            out = kernel(q, k, v, mask if mask is None else normalized(mask), scale)
            if out.shape != plan.out_shape:
                raise WrongOutput(f"it gave {tuple(out.shape)} instead of {tuple(plan.out_shape)}")
        except Exception as error:
            self._strike_for(plan, candidate, error)
            return self._careful(plan, Request(q, k, v, mask, scale, exact, core, drop_mask, heads_first))
        candidate.tally.calls += 1
        self.lossy_calls += candidate.lossy
        return out if heads_first else out.transpose(1, 2).reshape(plan.flat_shape)

    def _careful(self, plan: Plan, request: Request) -> torch.Tensor:
        """The first calls of a backend and shape: checked, timed, and done again with the next backend when wrong."""
        capturing = request.q.is_cuda and torch.cuda.is_current_stream_capturing()
        suspects: list[Candidate] = []
        q, k, v = request.q, request.k, request.v
        mask = request.mask if request.mask is None else normalized(request.mask)
        while True:
            candidate = plan.current
            if candidate.kernel is None:
                out = self._timed(candidate.tally, q, request.core, (request.drop_mask,), capturing)
                self._finish_core(plan, candidate, out, suspects, capturing)
                return out
            q, k, v = (checks.prepared(x, candidate.contiguous) for x in (q, k, v))
            inputs = (q, k, v, mask, request.scale)
            try:
                out = self._timed(candidate.tally, q, candidate.kernel, inputs, capturing)
                if out.shape != plan.out_shape or out.dtype != q.dtype:
                    raise WrongOutput(
                        f"it gave {tuple(out.shape)} {out.dtype} instead of {tuple(plan.out_shape)} {q.dtype}"
                    )
                if not capturing:
                    self._check(plan, candidate, inputs, out)
            except Exception as error:
                if isinstance(error, NotFinite):
                    suspects.append(candidate)
                self._strike_for(plan, candidate, error)
                continue
            candidate.tally.calls += 1
            self.lossy_calls += candidate.lossy
            return out if request.heads_first else out.transpose(1, 2).reshape(plan.flat_shape)

    def _check(self, plan: Plan, candidate: Candidate, inputs: tuple, out: torch.Tensor) -> None:
        """Raises NotFinite or WrongOutput when this output cannot be trusted; settles the plan after enough good ones."""
        if plan.checked < CHECKED_CALLS:
            finite = checks.is_finite(out)
            if not finite and all(checks.is_finite(x) for x in inputs[:3]):
                raise NotFinite("it made NaN or Inf from finite inputs")
            error = self._error(plan, inputs, out) if finite and candidate.lossy else None
            if error is not None:
                candidate.tally.error = max(error, candidate.tally.error or 0.0)
                if error > candidate.limit:
                    raise WrongOutput(
                        f"its error on this graph's tensors is {error:.2g}, over the budget of {candidate.limit:g}"
                    )
        plan.checked += 1
        plan.settled = plan.checked >= CHECKED_CALLS + TIMED_CALLS

    @staticmethod
    def _error(plan: Plan, inputs: tuple, out: torch.Tensor) -> float | None:
        """The relative error of an output against an exact backend on a few heads; None where none can be had."""
        if plan.reference is None:
            return None
        q, k, v, mask, scale = inputs
        separable = k.shape[1] == q.shape[1] and (mask is None or mask.shape[1] == 1)
        whole = (q, k, v, out)
        tries = [tuple(checks.some_heads(x) for x in whole), whole] if separable else [whole]
        for some_q, some_k, some_v, some_out in tries:
            try:
                return checks.relative_error(some_out, plan.reference(some_q, some_k, some_v, mask, scale))
            except torch.OutOfMemoryError:
                return None
            except RuntimeError:  # a kernel that does not take a view of some heads may take them all
                continue
        return None

    def _finish_core(
        self, plan: Plan, core: Candidate, out: torch.Tensor, suspects: list[Candidate], capturing: bool
    ) -> None:
        """Counts a call of ComfyUI's own, and clears backends of a NaN that ComfyUI's own makes too."""
        core.tally.calls += 1
        plan.checked += not capturing
        plan.settled = plan.checked >= CHECKED_CALLS + TIMED_CALLS
        if suspects and not capturing and not checks.is_finite(out):
            for candidate in suspects:
                self._pardon(candidate)
            self.report.note(
                f"Attention over {plan.call} is not finite with any backend: the inputs or the mask make it so."
            )
            plan.advance()
            plan.checked = CHECKED_CALLS

    def _pardon(self, candidate: Candidate) -> None:
        self.report.struck = [struck for struck in self.report.struck if struck is not candidate.struck]
        candidate.struck = None

    @staticmethod
    def _timed(
        tally: Tally, q: torch.Tensor, call: Callable[..., torch.Tensor], args: tuple, capturing: bool
    ) -> torch.Tensor:
        """Runs the call; from the third on, until enough are known, its time is taken without waiting for the GPU."""
        if capturing or tally.calls < CHECKED_CALLS or len(tally.milliseconds) + len(tally.events) >= TIMED_CALLS:
            return call(*args)
        if q.is_cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            out = call(*args)
            end.record()
            tally.events.append((start, end))
            return out
        begin = time.perf_counter()
        out = call(*args)
        tally.milliseconds.append((time.perf_counter() - begin) * 1e3)
        return out

    def _strike_for(self, plan: Plan, candidate: Candidate, error: Exception) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            self._strike(plan, candidate, "it ran out of memory", temporary=True)
        elif isinstance(error, (WrongOutput, NotFinite)):
            self._strike(plan, candidate, str(error))
        else:
            text = str(error).strip().splitlines()
            self._strike(plan, candidate, f"it raised {type(error).__name__}: {text[0] if text else ''}")

    def _strike(self, plan: Plan, candidate: Candidate, reason: str, temporary: bool = False) -> None:
        """Takes a candidate off a plan for good, or for this run; tells the user once per backend and kind of reason."""
        candidate.struck = Struck(candidate.backend, plan.call, reason, temporary)
        self.report.struck.append(candidate.struck)
        plan.advance()
        kind = (candidate.backend, " ".join(reason.split()[:2]))
        if kind not in self._told:
            self._told.add(kind)
            log.warning(
                "Attention backend %s is struck off for %s: %s. %s takes over.",
                candidate.backend, plan.call, reason, plan.current.backend,
            )  # fmt: skip

    def _new_plan(self, request: Request) -> Plan:
        """The candidates for calls like this one, fastest first; measures them when the policy says so."""
        environment = self._environment(request.q.device)
        mask = request.mask if request.mask is None else normalized(request.mask)
        request = request._replace(mask=mask)
        budget = "exact" if request.exact else self.policy.effective_budget
        call = AttentionCall.of(request.q, request.k, request.v, mask, request.scale)
        usable = self._usable(request, call, environment, budget) if self._well_formed(request) else {}
        if self.policy.backend == MEASURED and not (request.q.is_cuda and torch.cuda.is_current_stream_capturing()):
            names = self._measured_order(request, call, environment, budget, usable)
        else:
            names = self._order(call, environment, budget, usable)
        candidates = [usable[name] for name in names[: names.index(CORE)] if name in usable]
        if candidates and environment.device_type == "cuda":
            first = self._backends[candidates[0].backend]
            if environment.compute_capability not in first.tested_on:
                self.report.note(f"{first.name} was never run by us on cc {environment.compute_capability}.")
        last = Candidate(CORE, None, None, float("inf"), self._tally(CORE, call, budget))
        reference = next((candidate.kernel for candidate in usable.values() if not candidate.lossy), None)
        return Plan(call, [*candidates, last], reference)

    @staticmethod
    def _well_formed(request: Request) -> bool:
        """Whether these are plain attention inputs at all; whatever is not goes to ComfyUI's own untouched."""
        q, k, v, mask = request[:4]
        if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
            return False
        if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.requires_grad:
            return False
        if mask is None:
            return True
        wanted = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        fits = mask.ndim == 4 and all(have in (1, want) for have, want in zip(mask.shape, wanted, strict=True))
        return fits and mask.device == q.device and mask.dtype in (torch.bool, q.dtype)

    def _usable(
        self, request: Request, call: AttentionCall, environment: Environment, budget: str
    ) -> dict[str, Candidate]:
        """Every backend that can take the call, in the table's order; why the one asked for cannot is noted."""
        usable: dict[str, Candidate] = {}
        q, k, v = (checks.prepared(x) for x in request[:3])
        for backend in self._backends.values():
            named = backend.name == self.policy.backend and not request.exact
            paired = backend.name == self.policy.paired and not request.exact
            limit = float("inf") if named else ERROR_LIMITS[backend.error_class if paired else budget]
            reason = backend.why_not_here(environment) or backend.why_not(call, environment)
            if reason is None and backend.name in self._barred:
                reason = Reason(self._barred[backend.name])
            if reason is None and not backend.accepts(q, k, v, request.mask):
                reason = Reason("torch has no such kernel for these tensors")
            if reason is None and ERROR_LIMITS[backend.error_class] > limit:
                reason = Reason(f"its error class is {backend.error_class} and this call must be {budget}")
            if reason is None:
                try:
                    kernel = backend.bind(environment)
                except Exception as error:
                    reason = Reason(f"it cannot be set up ({error})", setup=True)
            if reason is not None:
                self._decline(backend, reason)
                continue
            tally = self._tally(backend.name, call, budget)
            usable[backend.name] = Candidate(backend.name, kernel, backend, limit, tally)
        return usable

    def _decline(self, backend: Backend, reason: Reason) -> None:
        if backend.name not in (self.policy.backend, self.policy.paired):
            return
        if backend.name == self.policy.backend and self.policy.stop and reason.setup:
            raise CapabilityError(cannot_run(backend.name, str(reason)))
        key = (backend.name, str(reason))
        self.report.declined[key] = self.report.declined.get(key, 0) + 1

    def _order(
        self, call: AttentionCall, environment: Environment, budget: str, usable: dict[str, Candidate]
    ) -> tuple[str, ...]:
        """The `auto` order, with the backend asked for by name or paired with the weights in front."""
        names, source = ranking.order_for(environment.capability, budget, call, self._ranks)
        if self.policy.backend in usable:
            return (self.policy.backend, *names)
        paired = self.policy.paired
        long = min(call.q_len, call.kv_len) >= PAIRED_MIN_TOKENS
        # Where the table was measured it already knows whether the paired backend is the fastest for this shape.
        if paired in usable and budget != "exact" and source != ranking.MEASURED and long:
            return (paired, *names)
        if source == ranking.UNMEASURED and environment.device_type == "cuda" and self.policy.backend == AUTO:
            self.report.note(
                f"We have measured nothing on cc {environment.compute_capability}, so auto keeps ComfyUI's own attention "
                "here; measured times the others on this graph."
            )
        return names

    def _measured_order(
        self,
        request: Request,
        call: AttentionCall,
        environment: Environment,
        budget: str,
        usable: dict[str, Candidate],
    ) -> tuple[str, ...]:
        """Backend names by time on this graph's own tensors, from the cache when this shape is known there."""
        key, where = f"{call}, budget {budget}", environment.fingerprint()
        known = self._timings.get(where, key)
        if known is None or not set(usable) <= set(known):
            timed = {name: partial(candidate.on, request) for name, candidate in usable.items()}
            timed[CORE] = partial(request.core, request.drop_mask)
            known = measure.milliseconds(timed, request.q.device)
            self._timings.put(where, key, known)
        for name, candidate in usable.items():
            if name in known and not candidate.tally.milliseconds:
                candidate.tally.milliseconds.append(known[name])
        return tuple(sorted((name for name in known if name in usable or name == CORE), key=known.__getitem__))

    def _tally(self, backend: str, call: AttentionCall, budget: str) -> Tally:
        for tally in self.report.tallies:
            if (tally.backend, tally.call, tally.budget) == (backend, call, budget):
                return tally
        self.report.tallies.append(Tally(backend, call, budget))
        return self.report.tallies[-1]


def cannot_run(name: str, reason: str) -> str:
    """The one sentence for a backend asked for by name that cannot run."""
    return f"The attention backend {name} cannot run: {reason}. Choose another one, or let it fall back."


def check_named(policy: Policy, environment: Environment, backends: tuple[Backend, ...] = BACKENDS) -> str | None:
    """Why the backend the policy names cannot run on this machine, None when it can or none is named.

    Raises CapabilityError when the policy says stop, and for a name that is no backend.
    """
    if policy.backend in (AUTO, MEASURED):
        return None
    backend = by_name(backends).get(policy.backend)
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
