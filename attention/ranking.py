"""The `auto` table: which backends to try first, by compute capability, budget, lengths and head dim. Data, filled from measurements."""

from __future__ import annotations

from dataclasses import dataclass

from .backends import CORE, AttentionCall

ANY = (0, 2**62)
MEASURED = "benchmarks/results/attention.json"
PUBLIC = "public measurements only; not run by us on this GPU"


@dataclass(frozen=True)
class Rank:
    """One row: where it applies, and the backends in order of speed there, the fastest first.

    capability: inclusive range. q_len, kv_len, head_dim: inclusive ranges. masked, grouped (fewer key than query
    heads): None for both.
    source: where the order comes from.
    """

    capability: tuple[tuple[int, int], tuple[int, int]]
    budget: str
    order: tuple[str, ...]
    source: str
    q_len: tuple[int, int] = ANY
    kv_len: tuple[int, int] = ANY
    head_dim: tuple[int, int] = ANY
    masked: bool | None = None
    grouped: bool | None = None

    def applies(self, capability: tuple[int, int], budget: str, call: AttentionCall) -> bool:
        """Whether this row is the one for the call."""
        return (
            self.capability[0] <= capability <= self.capability[1]
            and self.budget == budget
            and self.q_len[0] <= call.q_len <= self.q_len[1]
            and self.kv_len[0] <= call.kv_len <= self.kv_len[1]
            and self.head_dim[0] <= call.head_dim <= self.head_dim[1]
            and self.masked in (None, call.mask is not None)
            and self.grouped in (None, call.kv_heads != call.heads)
        )


HOPPER = ((9, 0), (9, 0))
SAGE_FIRST = ("sageattn_3_fp8", "cudnn", CORE)

# The first row that applies decides. Where none does, ComfyUI's own attention stays: nothing is known to be faster.
RANKS: tuple[Rank, ...] = (
    Rank(HOPPER, "exact", ("cudnn", CORE), MEASURED),
    Rank(HOPPER, "balanced", ("cudnn", CORE), MEASURED),
    # SageAttention quantizes before it multiplies, which pays from about 14,000 tokens on: sooner with fewer key heads.
    Rank(HOPPER, "fast", SAGE_FIRST, MEASURED, q_len=(14336, ANY[1]), kv_len=(14336, ANY[1])),
    Rank(HOPPER, "fast", SAGE_FIRST, MEASURED, q_len=(8192, ANY[1]), kv_len=(8192, ANY[1]), grouped=True),
    Rank(HOPPER, "fast", ("cudnn", CORE), MEASURED),
)


def order_for(
    capability: tuple[int, int], budget: str, call: AttentionCall, ranks: tuple[Rank, ...] = RANKS
) -> tuple[tuple[str, ...], str]:
    """Backend names to try, fastest first, and where that order comes from. Always ends with ComfyUI's own."""
    for rank in ranks:
        if rank.applies(capability, budget, call):
            return (*(name for name in rank.order if name != CORE), CORE), rank.source
    return (CORE,), "nothing measured on this GPU: ComfyUI's own pick"
