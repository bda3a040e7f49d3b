"""A sample of two processes is the sample of one: every kind of model, every split, with LoRAs, attention and formats."""

from __future__ import annotations

import pytest
import torch

from lowbit.host.several_gpus.trial import TRIES
from testing.measure import relative_error

from .conftest import CPUS, HEADS
from .support import EXACT, Run, talking, with_lora

MASK = torch.zeros(1, 1, 5, 6, 8)
MASK[:, :, 1:] = 1

RUNS = {
    "wan": ("wan", Run((1, 16, 3, 10, 14))),
    "wan, prompts of several lengths": ("wan", Run((1, 16, 2, 6, 10), text=((7, 11), 64))),
    "wan, two at once": ("wan", Run((2, 16, 2, 6, 10), cfg=1.0)),
    "wan, image to video": (
        "wan_i2v",
        Run((1, 16, 3, 6, 10), conds={"concat_latent_image": torch.ones(1, 16, 3, 6, 10) / 3}),
    ),
    "wan 5B, a timestep a frame": ("wan_5b", Run((1, 48, 5, 6, 8), mask=MASK)),
    "qwen": ("qwen", Run((1, 16, 1, 14, 10))),
    "qwen, prompts of several lengths": ("qwen", Run((1, 16, 1, 14, 10), text=((6, 9), 64))),
    "qwen, a text mask": (
        "qwen",
        Run((1, 16, 1, 14, 10), conds={"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]])}),
    ),
    "qwen edit": ("qwen", Run((1, 16, 1, 8, 10), conds={"reference_latents": [torch.ones(1, 16, 1, 6, 6)]})),
    "qwen edit, references at timestep 0": (
        "qwen_edit",
        Run((1, 16, 1, 8, 10), conds={"reference_latents": [torch.ones(1, 16, 1, 6, 6)] * 2}),
    ),
}


EIGHT_BITS = 0.01
"""Of the latent, which errs less than attention does."""

BATCHED = (
    "wan",
    "wan, image to video",
    "wan 5B, a timestep a frame",
    "qwen",
    "qwen, a text mask",
    "qwen edit",
    "qwen edit, references at timestep 0",
)
"""Where both prompts have the same shapes, so that each can go to a process of its own."""


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("split", ["sequence", "auto"])
def test_equal_to_one_process(load, divide, parts, name, split):
    model, run = load(RUNS[name][0]), RUNS[name][1]
    alone = run.sample(model)
    assert relative_error(run.sample(divide(model, split)), alone) <= EXACT
    assert divide.said == []
    # auto tries fewer processes of a group as well.
    groups = {part.split()[0] for part in parts}
    assert groups == ({"first", "second"} if split == "auto" and name in BATCHED else {"all"})


def test_auto_tries_fewer_processes_and_the_sample_stays_the_same(load, divide, parts):
    model, run = load("wan"), Run((1, 16, 2, 6, 12), cfg=1.0)
    assert relative_error(run.sample(divide(model, "auto"), 2 * TRIES + 1), run.sample(model, 2 * TRIES + 1)) <= EXACT
    assert parts[: 2 * TRIES] == ["all"] * TRIES + ["all 1"] * TRIES
    assert len(parts) == 2 * TRIES + 1


def test_references_are_part_of_the_size_that_auto_tries(load, divide, workers):
    def tried(*references: int) -> set[str]:
        conds = {"reference_latents": [torch.ones(1, 16, 1, 6, width) for width in references]}
        Run((1, 16, 1, 8, 10), cfg=1.0, conds=conds).sample(divide(load("qwen"), "auto"), 1)
        return set(workers()._trials)

    one = tried(6)
    assert tried(6) == one
    assert len(tried(6, 8)) == len(one) + 1


def test_a_split_by_prompts_that_cannot_be_batched_says_so_and_splits_tokens(load, divide, parts):
    model, run = load("qwen"), RUNS["qwen, prompts of several lengths"][1]
    assert relative_error(run.sample(divide(model, "cfg")), run.sample(model)) <= EXACT
    assert set(parts) == {"all"}
    assert ["could not batch" in sentence for sentence in divide.said] == [True]


@pytest.mark.parametrize("name", ["wan", "qwen edit", "wan 5B, a timestep a frame"])
def test_unequal_gpus_get_unequal_parts(host, load, divide, workers, monkeypatch, name):
    model, run = load(RUNS[name][0]), RUNS[name][1]
    alone, divided = run.sample(model), divide(model, "auto")
    monkeypatch.setattr(host.team.Team, "speeds", [1.0, 2.5])
    workers().leave()
    dealt = []
    deal = host.forward.CoreForward._deal

    def seen(self, named):
        reason = deal(self, named)
        dealt.append(list(self._dealt.values()))
        return reason

    monkeypatch.setattr(host.forward.CoreForward, "_deal", seen)
    assert relative_error(run.sample(divided), alone) <= EXACT
    assert dealt
    assert all(own < other for streams in dealt for own, other in streams)
    workers().leave()


@pytest.mark.parametrize("pieces", [2, 4])
def test_heads_may_travel_in_pieces(host, load, divide, monkeypatch, pieces):
    """As they do where there is much of them."""
    model, run = load("wan"), RUNS["wan"][1]
    alone, divided = run.sample(model), divide(model)
    monkeypatch.setattr(host.team.Team, "_exchange", lambda team, part: host.team.Exchange(pieces, small=0))
    assert relative_error(run.sample(divided), alone) <= EXACT


@pytest.mark.parametrize("name", ["wan", "qwen edit"])
def test_keys_and_values_may_travel_in_eight_bits(host, load, parts, name):
    model, run = load(RUNS[name][0]), RUNS[name][1]
    alone, said = run.sample(model), []
    divided = host.dividing.divide(model, CPUS, "sequence", said.append, eight_bits=True)
    assert EXACT < relative_error(run.sample(divided), alone) < EIGHT_BITS
    assert set(parts) == {"all"}
    assert said == []


@pytest.mark.parametrize("frames", [4, 3])
def test_infinitetalk_by_frames(host, load, divide, parts, frames):
    model = talking(host, load("talk"), frames)
    run = Run((1, 16, frames, 6, 10), cfg=1.0, text=((5, 5), 256))
    alone = run.sample(model)
    assert relative_error(alone, run.sample(load("talk"))) > 0.01, "the audio does nothing"
    assert relative_error(run.sample(divide(model)), alone) <= EXACT
    assert set(parts) == {"all"}
    assert divide.said == []


def test_a_video_of_fewer_frames_than_gpus_runs_on_one(host, load, divide):
    model, run = talking(host, load("talk"), 1), Run((1, 16, 1, 6, 10), cfg=1.0, text=((5, 5), 256))
    assert relative_error(run.sample(divide(model)), run.sample(model)) <= EXACT
    assert ["fewer frames" in sentence for sentence in divide.said] == [True]


FORMATS = [("wan", None), *(("wan", name) for name in ("int8", "int8_convrot_fast", "fp8_e4m3fn_scaled", "fp4_scaled"))]


@pytest.mark.parametrize(("name", "weights"), [*FORMATS, ("qwen", "int8_convrot_fast")])
def test_loras_and_formats(load, divide, parts, name, weights):
    """Equal within the format's own noise, what a trifle in the input comes to; a LoRA comes, changes and goes."""
    model, run = load(name, weights), RUNS[name][1]
    latents = []
    for strength in (0.0, 0.7, -0.4):
        patched = with_lora(model, strength) if strength else model
        alone = run.sample(patched)
        noise = relative_error(run.nudged().sample(patched), alone)
        assert relative_error(run.sample(divide(patched)), alone) <= max(EXACT, 2 * noise)
        latents.append(alone)
    assert relative_error(latents[1], latents[0]) > 0.01
    assert relative_error(latents[2], latents[1]) > 0.01
    assert parts


def test_attention_of_this_pack_goes_along(load, divide, parts, tmp_path):
    """This process's report has the heads that it took, over all tokens."""
    from lowbit.attention.candidates import Policy
    from lowbit.attention.schedule import Schedule
    from lowbit.host.attention.installing import find_override, install_override

    model, run = load("wan"), RUNS["wan"][1]
    attending, _ = install_override(model, Policy("auto", "exact"), Schedule(first_steps=1), False, tmp_path)
    divided = divide(attending)
    assert relative_error(run.sample(divided), run.sample(model)) <= EXACT
    assert set(parts) == {"all"}
    assert {(HEADS + 1) // 2, HEADS} == {key[1][1] for key in find_override(divided).dispatcher._plans}


def test_two_models_take_turns(load, divide, workers):
    wan, qwen = divide(load("wan")), divide(load("qwen"))
    pids = [worker.process.pid for worker in workers().workers]
    for _ in range(2):
        for name, model in (("wan", wan), ("qwen", qwen)):
            run = RUNS[name][1]
            assert relative_error(run.sample(model), run.sample(load(name))) <= EXACT
    assert pids == [] or [worker.process.pid for worker in workers().workers] == pids


@pytest.mark.parametrize("both", [False, True])
def test_the_second_model_of_a_run_is_not_taken_for_the_first(load, divide, parts, both):
    """Its forward comes by the first one's hooks."""
    from comfy.samplers import calculate_sigmas, sampler_object
    from comfy_extras.nodes_custom_sampler import Guider_DualModel

    run, first, second = RUNS["wan"][1], load("wan"), load("wan", "int8")

    def sample(model, other):
        guider = Guider_DualModel(model, other)
        guider.set_conds(*run.prompts)
        guider.set_cfg(run.cfg)
        sigmas = calculate_sigmas(model.get_model_object("model_sampling"), "simple", 2)
        return guider.sample(run.noise, run.latent, sampler_object("euler"), sigmas, disable_pbar=True, seed=5)

    alone = sample(first, second)
    assert relative_error(sample(divide(first), divide(second) if both else second), alone) <= EXACT
    assert parts == ["all", "all"]
    assert ["second model" in sentence for sentence in divide.said] == [True]


FOUR = tuple(torch.device(name) for name in ("cpu", "cpu", "cpu", "cpu"))


def test_four_processes(host, load, parts):
    """Two for each prompt, all for the tokens; with more processes than heads too."""
    said = []
    for name, split, expected in (
        ("wan", "both", {"first", "second"}),
        ("wan, prompts of several lengths", "both", {"all"}),
        ("wan", "sequence", {"all"}),
        ("qwen edit, references at timestep 0", "auto", {"first", "second"}),
        ("qwen", "sequence", {"all"}),
    ):
        model, run = load(RUNS[name][0]), RUNS[name][1]
        parts.clear()
        divided = host.dividing.divide(model, FOUR, split, said.append)
        assert relative_error(run.sample(divided), run.sample(model)) <= EXACT, (name, split)
        assert set(parts) == expected
    assert said == []
    host.dividing._TEAMS.pop(FOUR).close()


def _managed(model):
    from lowbit.host.memory.manager import manage
    from lowbit.memory.policies import Settings

    return manage(model, None, None, Settings("auto", sequential_cfg="on"), "1")[0]


def _skipping(model):
    from comfy_extras.nodes_easycache import EasyCacheNode

    return EasyCacheNode.execute(model, 0.9, 0.0, 1.0, False).args[0]


@pytest.mark.parametrize("node", [_managed, _skipping])
@pytest.mark.parametrize("before", [True, False])
def test_other_nodes_may_come_before_or_after(load, divide, parts, node, before):
    model, run = load("wan"), RUNS["wan"][1]
    alone = run.sample(node(model), 6)
    divided = divide(node(model), "auto") if before else node(divide(model, "auto"))
    assert relative_error(run.sample(divided, 6), alone) <= EXACT
    # Each of the 6 steps in halves, or once for each prompt; EasyCache's wrapper skips some for all processes.
    assert 0 < len(parts) <= (12 if node is _managed else 10)
    assert divide.said == []
