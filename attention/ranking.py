"""The `auto` table: which backends to try first, by compute capability, budget, lengths and head dim. Data, filled from measurements."""

from __future__ import annotations

from dataclasses import dataclass

from .backends import CORE, AttentionCall

ANY = (0, 2**62)
MEASURED = "benchmarks/results/attention.json"
UNMEASURED = "nothing measured on this compute capability"


@dataclass(frozen=True)
class Rank:
    """One row: where it applies, and the backends in order of speed there, the fastest first.

    capability: inclusive range. q_len, kv_len, head_dim: inclusive ranges.
    source: where the order comes from.
    """

    capability: tuple[tuple[int, int], tuple[int, int]]
    budget: str
    order: tuple[str, ...]
    source: str
    q_len: tuple[int, int] = ANY
    kv_len: tuple[int, int] = ANY
    head_dim: tuple[int, int] = ANY

    def applies(self, capability: tuple[int, int], budget: str, call: AttentionCall) -> bool:
        """Whether this row is the one for the call."""
        return (
            self.capability[0] <= capability <= self.capability[1]
            and self.budget == budget
            and self.q_len[0] <= call.q_len <= self.q_len[1]
            and self.kv_len[0] <= call.kv_len <= self.kv_len[1]
            and self.head_dim[0] <= call.head_dim <= self.head_dim[1]
        )


HOPPER = ((9, 0), (9, 0))
SAGE_FIRST = ("sageattn_3_fp8", "cudnn", CORE)

# The first row that applies decides. Where none does, the planner times the backends.
RANKS: tuple[Rank, ...] = (
    Rank(HOPPER, "exact", ("cudnn", CORE), MEASURED),
    Rank(HOPPER, "balanced", ("cudnn", CORE), MEASURED),
    # SageAttention quantizes before it multiplies: at 4,608 tokens that costs 20% over cuDNN, at 8,704 it has paid off.
    Rank(HOPPER, "fast", SAGE_FIRST, MEASURED, q_len=(8192, ANY[1]), kv_len=(8192, ANY[1]), head_dim=(128, 128)),
    Rank(HOPPER, "fast", ("cudnn", CORE), MEASURED),
)


def order_for(
    capability: tuple[int, int], budget: str, call: AttentionCall, ranks: tuple[Rank, ...] = RANKS
) -> tuple[tuple[str, ...], str]:
    """Backend names to try, fastest first, and where that order comes from. Always ends with ComfyUI's own."""
    for rank in ranks:
        if rank.applies(capability, budget, call):
            return (*(name for name in rank.order if name != CORE), CORE), rank.source
    return (CORE,), UNMEASURED
