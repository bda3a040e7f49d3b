"""Blocks are fetched by core's own queue, in their turn, through streams of their own; nothing is left behind."""

from __future__ import annotations

import itertools
import types

import pytest
import torch

from .support import device, hooks, host, loaded, stepping

__all__ = ["device", "host", "loaded"]

CPU = torch.device("cpu")
OPTIONS = {"prefetch_dynamic_vbars": True}


class Pages:
    """Dynamic VRAM's pages of one model."""

    def __init__(self, loaded_bytes: int, nbytes: int = 100):
        self.loaded_bytes, self.offset = loaded_bytes, nbytes

    def loaded_size(self) -> int:
        return self.loaded_bytes


class Block(torch.nn.Module):
    def __init__(self, name: str, ran: list[str], pages: Pages):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)
        self.linear._v = (pages, 0, 10)
        self.name, self.ran = name, ran

    def forward(self, x):
        self.ran.append(self.name)
        return x + 1


class Model(torch.nn.Module):
    def __init__(self, pages: Pages, count: int = 3):
        super().__init__()
        self.ran: list[str] = []
        self.blocks = torch.nn.ModuleList(Block(f"block {number}", self.ran, pages) for number in range(count))
        self.order = list(range(count))

    def forward(self, x, timestep, transformer_options):
        for number in self.order:
            x = self.blocks[number](x)
        return x


@pytest.fixture
def core(host, monkeypatch):
    """Core's queue with its transfers written down instead of made, and the streams that it would take."""
    import comfy.model_management
    import comfy.model_prefetch

    from lowbit.host.memory import fetching

    seen = types.SimpleNamespace(fetched=[], streams=[], queues=[], fetching=fetching)

    def make(blocks, device, options):
        if not options.get("prefetch_dynamic_vbars"):
            return None
        seen.queues.append([None, *blocks, None])
        return seen.queues[-1]

    def pop(queue, device, module):
        seen.streams.append(comfy.model_management.STREAMS[device])
        comfy.model_management.stream_counters[device] = len(seen.streams)
        done = queue.pop(0)
        if done is not None:
            vars(done.linear).pop("_prefetch")
        if queue[0] is not None:
            assert queue[0] is module
            module.linear._prefetch = {}
            module.ran.append(f"fetch {module.name}")

    monkeypatch.setattr(comfy.model_prefetch, "make_prefetch_queue", make)
    monkeypatch.setattr(comfy.model_prefetch, "prefetch_queue_pop", pop)
    # PyTorch's pool hands the same few streams out again and again.
    pool = itertools.cycle(types.SimpleNamespace(cuda_stream=handle) for handle in range(4))

    def offload_stream(device):
        streams = comfy.model_management.STREAMS.setdefault(device, [next(pool), next(pool)])
        comfy.model_management.stream_counters.setdefault(device, 0)
        return streams[0]

    seen.theirs = [next(pool), next(pool)]
    monkeypatch.setattr(comfy.model_management, "get_offload_stream", offload_stream)
    monkeypatch.setattr(comfy.model_management, "STREAMS", {CPU: seen.theirs})
    monkeypatch.setattr(fetching, "_OWN", {})
    monkeypatch.setattr(comfy.model_management, "stream_counters", {CPU: 7})
    monkeypatch.setitem(fetching.BLOCKS, Model, "blocks")
    seen.management = comfy.model_management
    return seen


def run(core, model, fetcher=None, options=OPTIONS):
    """The model's forward as core's executor calls it, options by place."""

    class Executor:
        class_obj = model

        def __call__(self, *args, **kwargs):
            return model(*args, **kwargs)

    fetcher = fetcher or core.fetching.BlockFetcher()
    return fetcher(Executor(), torch.zeros(1), 0.5, options)


def left_clean(core, model):
    hooks = [hook for block in model.blocks for hook in block._forward_pre_hooks]
    fetched = [block for block in model.blocks if "_prefetch" in vars(block.linear)]
    streams = core.management.STREAMS, core.management.stream_counters
    return not hooks and not fetched and streams == ({CPU: core.theirs}, {CPU: 7})


def test_each_block_is_fetched_before_it_runs(core):
    model = Model(Pages(40))
    assert run(core, model).item() == 3
    assert model.ran == [f"{what}block {number}" for number in range(3) for what in ("fetch ", "")]
    assert core.queues == [[None]]
    assert left_clean(core, model)


def test_streams_are_its_own_and_the_same_at_every_step(core):
    model, fetcher = Model(Pages(40)), core.fetching.BlockFetcher()
    for _ in range(2):
        run(core, model, fetcher)
    assert not {stream.cuda_stream for pair in core.streams for stream in pair} & {0, 1}
    assert len(set(map(id, core.streams))) == 1


def test_weights_that_come_off_the_disk_for_the_first_time_come_as_core_brings_them(core):
    """A whole block of them read at once held up the thread that launches, and with it the GPU, for seconds."""
    model, fetcher = Model(Pages(0)), core.fetching.BlockFetcher()
    run(core, model, fetcher)
    assert model.ran == ["block 0", "block 1", "block 2"]
    run(core, model, fetcher)
    assert len(model.ran) == 3 + 6, "from the second step on, also where nothing stays on the GPU"


def test_all_managers_of_the_process_share_one_pair(core):
    for _ in range(20):
        run(core, Model(Pages(40)))
    assert len(set(map(id, core.streams))) == 1


def test_streams_that_turn_out_to_be_cores_are_given_up(core):
    """Core makes its own anew, out of the same pool."""
    run(core, Model(Pages(40)))
    (ours,) = {id(pair): pair for pair in core.streams}.values()
    core.theirs = core.management.STREAMS[CPU] = list(ours)
    core.streams.clear()
    run(core, Model(Pages(40)))
    assert not {stream.cuda_stream for pair in core.streams for stream in pair} & {
        stream.cuda_stream for stream in ours
    }


@pytest.mark.parametrize("case", ["resident", "legacy", "off", "unknown model", "compiled", "no pages"])
def test_nothing_is_fetched_where_nothing_streams_or_it_is_not_wanted(core, monkeypatch, case):
    model, fetcher = Model(Pages(100 if case == "resident" else 40)), core.fetching.BlockFetcher()
    fetcher.enabled = case != "off"
    if case == "unknown model":
        monkeypatch.delitem(core.fetching.BLOCKS, Model)
    if case == "compiled":
        model.blocks[1]._orig_mod = model.blocks[1]
    if case == "no pages":
        for block in model.blocks:
            del block.linear._v
    assert run(core, model, fetcher, {} if case == "legacy" else OPTIONS).item() == 3
    assert model.ran == ["block 0", "block 1", "block 2"]
    assert left_clean(core, model)


def test_a_forward_that_is_being_compiled_asks_dynamic_vram_nothing(core, monkeypatch):
    """It answers through ctypes, which cannot be traced."""

    class Untraceable:
        def loaded_size(self):
            raise AssertionError("asked")

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert run(core, Model(Untraceable())).item() == 3


@pytest.mark.parametrize(
    ("order", "fetched"), [([0, 2], [0, 2]), ([2], [2]), ([], []), ([1, 0, 2], [1, 2]), ([0, 0, 1], [0, 1])]
)
def test_blocks_that_are_skipped_repeated_or_out_of_turn_run_all_the_same(core, order, fetched):
    """Guidance and caching nodes skip blocks."""
    model = Model(Pages(40))
    model.order = order
    assert run(core, model).item() == len(order)
    assert [step for step in model.ran if "fetch" in step] == [f"fetch block {number}" for number in fetched]
    assert left_clean(core, model)


def test_a_block_that_core_has_fetched_is_left_to_it(core):
    model = Model(Pages(40))
    for block in model.blocks:
        block.linear._prefetch = {}
    run(core, model)
    assert model.ran == ["block 0", "block 1", "block 2"]


def test_hooks_and_streams_are_undone_after_an_error(core, monkeypatch):
    model = Model(Pages(40))
    monkeypatch.setattr(model.blocks[1], "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(core, model)
    vars(model.blocks[1].linear).pop("_prefetch")  # core's own cleaning does, at the end of the node
    assert left_clean(core, model)


def test_the_models_that_are_known_have_such_blocks(core):
    """Core may rename them."""
    for kind, name in core.fetching.BLOCKS.items():
        if kind is not Model:
            assert f"self.{name} = " in _source(kind)
            assert "WrappersMP.DIFFUSION_MODEL" in _source(kind)


def _source(kind: type) -> str:
    import inspect

    return inspect.getsource(kind)


@pytest.mark.parametrize(
    ("policy", "fetches"), [("auto", True), ("speed", True), ("balanced", True), ("lowest", False)]
)
def test_the_policy_says_whether_and_a_step_that_ran_out_of_memory_is_the_last_that_does(host, device, policy, fetches):
    made = hooks(host, policy=policy)
    assert made.fetcher.enabled is fetches
    calls = []

    def step(*args):
        calls.append(made.fetcher.enabled)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    model = stepping(dynamic=True)
    assert made.calc_cond_batch(step, model, [None], torch.zeros(1, 4, 8, 8), None, {}) == "done"
    assert calls == [fetches, False]
