"""Claims about the number of processes: tried from most to fewest, as long as that is faster, and kept."""

from __future__ import annotations

import pytest

from lowbit.host.several_gpus import trial
from lowbit.kernels.measured import MeasuredNumbers


def run(counts, seconds, kept, forwards=12):
    """The numbers of processes of some forwards; seconds: what one takes with each of them."""
    found = trial.Trial(counts, kept, "here", "model")
    used = []
    for forward in range(forwards):
        used.append(found.count)
        if not found.settled:
            first = forward % trial.TRIES == 0
            found.took(seconds[found.count] + first)
    return used


CASES = {
    "all are faster": ({4: 0.2, 2: 0.3, 1: 0.1}, 4, 6),
    "half of them are": ({4: 0.2, 2: 0.1, 1: 0.15}, 2, 9),
    "one is": ({4: 0.2, 2: 0.15, 1: 0.1}, 1, 9),
    "a forward keeps GPUs busy": ({4: 2 * trial.LONG, 2: 0.1, 1: 0.1}, 4, 3),
}


@pytest.mark.parametrize("name", CASES)
def test_the_fastest_number_stays(tmp_path, name):
    seconds, fastest, tried = CASES[name]
    kept = MeasuredNumbers(tmp_path, trial.FILE_NAME)
    used = run([4, 2, 1], seconds, kept)
    assert used[:tried] == [count for count in (4, 2, 1) for _ in range(trial.TRIES)][:tried]
    assert set(used[tried:]) == {fastest}
    again = MeasuredNumbers(tmp_path, trial.FILE_NAME)
    assert set(run([4, 2, 1], seconds, again)) == {fastest}


def test_another_machine_or_model_is_tried_anew(tmp_path):
    kept = MeasuredNumbers(tmp_path, trial.FILE_NAME)
    run([2, 1], {2: 0.2, 1: 0.1}, kept)
    assert trial.Trial([2, 1], kept, "here", "model").settled
    assert not trial.Trial([2, 1], kept, "there", "model").settled
    assert not trial.Trial([2, 1], kept, "here", "another").settled


@pytest.mark.parametrize("tried", [1, 2 * trial.TRIES])
def test_few_without_memory_are_not_tried_again(tmp_path, tried):
    """While they are tried, and where they were found to be the fastest, in other memory than there is now."""
    kept = MeasuredNumbers(tmp_path, trial.FILE_NAME)
    found = trial.Trial([4, 2, 1], kept, "here", "model")
    assert not found.failed(), "all of them have to work"
    for _ in range(trial.TRIES):
        found.took(0.2)
    assert found.count == 2
    for forward in range(tried):
        found.took(0.1 + (forward >= trial.TRIES))
    assert (found.settled, found.count) == (tried > 1, 2)
    assert found.failed()
    for now in (found, trial.Trial([4, 2, 1], kept, "here", "model")):
        assert (now.settled, now.count) == (True, 4)
        assert not now.failed()
