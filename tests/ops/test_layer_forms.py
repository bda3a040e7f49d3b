"""Claims about the choice of forms: within the bytes, never less exact for more of them, and the same every time."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from lowbit.ops.layer_forms import Form, choose_forms, ladder_of

FORMS = st.lists(
    st.builds(Form, st.sampled_from("abc"), st.integers(1, 1000), st.floats(0, 10, allow_subnormal=False)),
    min_size=1,
    max_size=4,
)
MODELS = st.lists(FORMS.map(ladder_of), min_size=1, max_size=6)
LIMITS = st.integers(0, 6000)


def nbytes(forms) -> int:
    return sum(form.nbytes for form in forms)


def loss(forms) -> float:
    return math.fsum(form.loss for form in forms)


@given(FORMS)
def test_a_ladder_gives_up_exactness_only_for_bytes_and_loses_nothing_worth_having(forms):
    ladder = ladder_of(forms)
    for above, below in itertools.pairwise(ladder):
        assert above.nbytes > below.nbytes
        assert above.loss < below.loss
    for form in forms:
        assert any(rung.nbytes <= form.nbytes and rung.loss <= form.loss for rung in ladder)


@given(MODELS, LIMITS)
def test_the_bytes_are_kept_to_wherever_they_can_be(ladders, limit):
    chosen = choose_forms(ladders, limit)
    least = nbytes(ladder[-1] for ladder in ladders)
    assert nbytes(chosen) <= max(limit, least)
    assert all(form in ladder for form, ladder in zip(chosen, ladders, strict=True))


@given(MODELS, LIMITS, LIMITS)
def test_with_more_bytes_no_layer_is_less_exact(ladders, one, other):
    fewer, more = (choose_forms(ladders, limit) for limit in sorted((one, other)))
    assert all(rich.loss <= poor.loss for rich, poor in zip(more, fewer, strict=True))


@given(MODELS)
def test_where_everything_fits_all_is_as_exact_as_can_be(ladders):
    assert choose_forms(ladders, nbytes(ladder[0] for ladder in ladders)) == tuple(ladder[0] for ladder in ladders)


@given(MODELS, LIMITS)
def test_what_fits_loses_no_more_than_any_choice_of_as_many_bytes(ladders, limit):
    """The greedy choice is the best for the bytes that it takes, where each step of a ladder costs more than the one above."""
    ladders = [ladder[:2] for ladder in ladders]
    chosen = choose_forms(ladders, limit)
    others = [forms for forms in itertools.product(*ladders) if nbytes(forms) <= nbytes(chosen)]
    assert loss(chosen) <= min(map(loss, others)) * (1 + 1e-9) + 1e-9


def test_of_equal_steps_the_first_layers_is_taken_first():
    ladders = [(Form("a", 20, 1.0), Form("b", 10, 2.0)) for _ in range(3)]
    assert [form.weight_format for form in choose_forms(ladders, 50)] == ["b", "a", "a"]


def test_a_cheap_step_behind_a_dear_one_waits_for_it():
    steep = (Form("a", 30, 0.0), Form("b", 20, 100.0), Form("c", 10, 100.5))
    flat = (Form("a", 20, 0.0), Form("b", 10, 50.0))
    assert [form.weight_format for form in choose_forms([steep, flat], 40)] == ["a", "b"]
