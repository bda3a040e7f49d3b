"""Claims about drawing tokens: without a look at the device, what torch.multinomial and ComfyUI's filters draw."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import FormatError
from lowbit.text.sampling import Sampler, Sampling

VOCABULARY = 50
CPU = torch.device("cpu")


def draws(sampling: Sampling, logits: torch.Tensor, count: int) -> torch.Tensor:
    sampler = Sampler(sampling, VOCABULARY, CPU)
    return torch.cat([sampler.draw(logits.clone()) for _ in range(count)]).flatten()


@given(st.integers(0, 30), st.floats(0.1, 1.0), st.floats(0.0, 0.3), st.floats(0.2, 2.0), st.integers(0, 99))
@settings(max_examples=20)
def test_what_the_filters_leave_out_is_never_drawn(top_k, top_p, min_p, temperature, seed):
    torch.manual_seed(seed)
    logits = torch.randn(1, VOCABULARY) * 3
    made = draws(Sampling(True, temperature, top_k, top_p, min_p, seed=seed), logits, 40)
    order = logits[0].argsort(descending=True)
    if top_k:
        assert set(made.tolist()) <= set(order[:top_k].tolist())
    probabilities = (logits / temperature)[0].softmax(dim=0)
    if min_p:
        kept = (logits / temperature)[0, order[: top_k or VOCABULARY]].softmax(dim=0)
        floor = min_p * kept.max() * (1 - 1e-5)
        assert all(kept[(order == token).nonzero().item()] >= floor for token in made)
    assert probabilities[made].gt(0).all()


def test_the_distribution_is_the_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0] + [-40.0] * (VOCABULARY - 3)])
    made = draws(Sampling(True, 1.0, top_k=0, top_p=1.0, seed=3), logits, 6000)
    counted = torch.bincount(made, minlength=VOCABULARY)[:3] / 6000
    torch.testing.assert_close(counted, logits[0].softmax(dim=0)[:3], rtol=0, atol=0.025)


def test_seeds_repeat_and_differ():
    logits = torch.zeros(1, VOCABULARY)
    first, again, other = (draws(Sampling(True, top_k=0, seed=seed), logits, 20) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()


def test_penalties_count_history_and_what_was_drawn():
    """Without a penalty the first token would be drawn again and again."""
    logits = torch.full((1, VOCABULARY), -30.0)
    logits[0, :4] = torch.tensor([5.0, 4.0, 3.0, 2.0])
    sampling = Sampling(True, 0.01, top_k=0, top_p=1.0, presence_penalty=3.5)
    sampler = Sampler(sampling, VOCABULARY, CPU, history=[1])
    assert [sampler.draw(logits).item() for _ in range(3)] == [0, 2, 3]
    positive, negative = torch.tensor([[4.0, 3.9]]), torch.tensor([[-4.0, -4.1]])
    for values in (positive, negative):
        sampler = Sampler(Sampling(True, 0.01, top_k=0, top_p=1.0, repetition_penalty=2.0), 2, CPU, history=[0])
        assert sampler.draw(values).item() == 1


def test_temperature_zero_is_greedy_and_has_no_penalty():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    for sampling in (Sampling(False, repetition_penalty=9.0), Sampling(True, 0.0, presence_penalty=9.0)):
        sampler = Sampler(sampling, 3, CPU, history=[1])
        assert [sampler.draw(logits).item() for _ in range(2)] == [1, 1]


def test_a_penalty_that_divides_by_nothing_is_refused_where_it_counts():
    for penalty in (0.0, -1.0, float("nan")):
        with pytest.raises(FormatError, match="cannot divide"):
            Sampling(True, repetition_penalty=penalty)
        assert Sampling(False, repetition_penalty=penalty).greedy
