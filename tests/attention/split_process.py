"""One of several processes that attend to a sequence together: `split_process.py FOLDER RANK PROCESSES`."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as distributed

from lowbit.attention.sequence_split import Exchange, SequenceSplit, shares

folder, rank, processes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])


def attend(q, k, v, mask):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def main() -> None:
    """Heads that do not divide, fewer heads than processes, odd lengths, with and without a mask, in pieces or not, in 8 bits or not."""
    distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=processes)
    cases = []
    shapes = ((1, 5, 23, 8), (2, 2, 13, 16), (2, 6, 7, 8))
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    exchanges = [Exchange(pieces, small=0, eight_bits=eight) for pieces in (1, 3) for eight in (False, True)]
    all_speeds = ([1.0, 2.0, 1.5], [1.0, 1.0, 1.0])
    for number, (shape, dtype, exchange, masked, speeds) in enumerate(
        itertools.product(shapes, dtypes, exchanges, (False, True), all_speeds)
    ):
        generator = torch.Generator().manual_seed(number)
        q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
        mask = torch.randn(shape[0], 1, 1, shape[2], generator=generator).to(dtype) if masked else None
        tokens = shares(shape[2], speeds)
        first, last = sum(tokens[:rank]), sum(tokens[: rank + 1])
        plan = SequenceSplit(distributed.group.WORLD, tokens, speeds, exchange)
        own = (tensor[:, :, first:last] for tensor in (q, k, v))
        out = plan.attend(*own, attend, None if mask is None else mask[..., first:last])
        whole = attend(q, k, v, mask)
        expected = whole[:, first:last]
        error = ((out - expected).float().norm() / expected.float().norm()).item()
        together = plan.gather(expected)
        gathered = together is not None and torch.equal(together, whole)
        name = "8 bits" if exchange.eight_bits else str(dtype).removeprefix("torch.")
        cases.append({"bound": name, "error": error, "gathered": gathered})
    (folder / f"{rank}.json").write_text(json.dumps({"cases": cases}))
    distributed.barrier()
    distributed.destroy_process_group()


main()
