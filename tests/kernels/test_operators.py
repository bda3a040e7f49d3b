"""What torch.compile is told of the pack's operators."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.utils import get_first_incompatible_cudagraph_node

from lowbit.kernels.operators import register_own_operator


@pytest.mark.skipif(
    not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this PyTorch keeps no operator out of CUDA graphs"
)
def test_what_looks_things_up_stays_out_of_cuda_graphs():
    """A replay would read the weights, and follow the schedule, of the time when it was captured."""
    operator = register_own_operator("looking_up", "(Tensor x) -> Tensor", torch.clone, torch.empty_like).default
    graph = torch.fx.Graph()
    node = graph.call_function(operator, (graph.placeholder("x"),))
    graph.output(node)
    assert get_first_incompatible_cudagraph_node(torch.fx.GraphModule({}, graph)) is node


def test_an_operator_runs_on_any_device():
    """On what is no NVIDIA GPU it computes in plain PyTorch: a graph has it there too, in models of other nodes as well."""
    operator = register_own_operator("anywhere", "(Tensor x) -> Tensor", torch.clone, torch.empty_like).default
    for key in ("CPU", "CUDA", "XPU", "MPS", "PrivateUse1"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(operator.name(), key)
