"""Claims about decoding behind clip.generate: every family writes what core's own loop writes, token for token."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import pytest
import torch

from lowbit.errors import CapabilityError, CheckpointError
from lowbit.kernels.decode import decode_reference
from lowbit.ops.linear_weight import stored_weight

pytestmark = pytest.mark.headless

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SAMPLED = {
    "temperature": 0.8,
    "top_k": 20,
    "top_p": 0.9,
    "min_p": 0.02,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.3,
}
PROMPT, LENGTH = 9, 24


@pytest.fixture(scope="module")
def host(core_modules):
    """Core's text encoders on the CPU, and ours."""
    import comfy.ops
    from comfy.text_encoders import gemma4, llama, qwen35

    from lowbit.host.text import families, generating, route
    from lowbit.text.caches import HEAVY_HITTERS, CachePolicy

    with torch.inference_mode():
        yield types.SimpleNamespace(
            ops=comfy.ops.manual_cast,
            llama=llama,
            qwen35=qwen35,
            gemma4=gemma4,
            families=families,
            generating=generating,
            route=route,
            core=llama.BaseGenerate.generate,
            full=generating.TextGeneration(),
            heavy=lambda *sizes: generating.TextGeneration(cache=CachePolicy(HEAVY_HITTERS, *sizes)),
        )


def fill(model: Any) -> Any:
    """Seeded weights; embeddings so far apart that no two logits are close."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
        if parameter.ndim == 1 and "norm" in name:
            parameter.data += 1
        if "embed_tokens" in name:
            parameter.data *= 8
    for name, buffer in model.named_buffers():
        if "layer_scalar" in name:
            buffer.fill_(0.9)
    return model


def build(host, name: str) -> Any:
    """A tiny model of a family, and what its CLIP passes to `generate` besides."""
    llama = host.llama
    extra: dict[str, Any] = {}
    if name == "Qwen3-VL":
        bases = (llama.BaseLlama, llama.BaseQwen3, llama.BaseGenerate, torch.nn.Module)
        model = _part(host, llama.Qwen3VL_4BConfig(**SMALL), *bases)
        positions = torch.arange(PROMPT).repeat(3, 1)
        positions[1:, 3:7] = torch.tensor([[3, 3, 4, 4], [3, 4, 3, 4]])
        positions[0, 3:7], positions[:, 7:] = 3, torch.arange(5, 7)
        mask = torch.zeros(1, PROMPT, dtype=torch.bool)
        mask[0, 3:7] = True
        seen = [torch.randn(4, 64, generator=torch.Generator().manual_seed(layer)) for layer in range(2)]
        extra = {"position_ids": positions, "visual_pos_masks": mask, "deepstack_embeds": seen}
    elif name == "Qwen3.5":
        types_ = host.qwen35._qwen35_layer_types(5)
        config = {**SMALL, "num_hidden_layers": 5, "head_dim": 32, "layer_types": types_, "mrope_section": [2, 1, 1]}
        linear = {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 16, "value_head_dim": 16}
        config |= {f"linear_{key}": value for key, value in linear.items()}
        model = _part(host, host.qwen35.Qwen35Config(**config), transformer=host.qwen35.Qwen35Transformer)
        model.init_kv_cache = types.MethodType(host.qwen35.Qwen35.init_kv_cache, model)
    elif name.startswith("Gemma 4"):
        model = _gemma4(host, shares=name == "Gemma 4 E")
        ids = torch.randint(0, 300, (1, PROMPT), generator=torch.Generator().manual_seed(2))
        extra = {"initial_input_ids": ids, "initial_tokens": ids[0].tolist()}
    else:
        kind = {
            "Qwen3": llama.Qwen3_4B,
            "Qwen3 8B": llama.Qwen3_8B,
            "Ministral": llama.Ministral3_3B,
            "Gemma 2": llama.Gemma2_2B,
        }
        model = kind.get(name, llama.Gemma3_4B)(dict(SMALL), torch.float32, "cpu", host.ops)
        if name == "Gemma 3, a short window":
            for layer in model.model.layers[:2]:
                layer.sliding_attention = 5
            model.model.layers[2].sliding_attention = False
    return fill(model), {"stop_tokens": [], **extra}


def _part(host, config: Any, *bases: type, transformer: type | None = None) -> Any:
    """A language model of core's classes without the vision tower beside it."""
    bases = bases or (host.llama.BaseLlama, host.llama.BaseGenerate, torch.nn.Module)
    kind = type("Part", bases, {})
    model = kind.__new__(kind)
    torch.nn.Module.__init__(model)
    model.model = (transformer or host.llama.Llama2_)(config, device="cpu", dtype=torch.float32, ops=host.ops)
    return model


def _gemma4(host, shares: bool) -> Any:
    options: dict[str, Any] = {"head_dim": 32, "global_head_dim": 64, "sliding_attention": [6, 6, False]}
    fields = {**SMALL, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
    if shares:
        fields |= {"num_hidden_layers": 8, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16}
    else:
        options |= {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "suppress_tokens": [3]}
    config = host.gemma4.Gemma4Config(**fields)
    for name, value in options.items():
        setattr(config, name, value)
    return _part(host, config, host.gemma4.Gemma4Base, transformer=host.gemma4.Gemma4Transformer)


FAMILIES = (
    "Qwen3",
    "Qwen3 8B",
    "Qwen3-VL",
    "Qwen3.5",
    "Ministral",
    "Gemma 2",
    "Gemma 3",
    "Gemma 3, a short window",
    "Gemma 4 E",
    "Gemma 4 12B",
)


def embeddings(width: int = 64) -> torch.Tensor:
    """A prompt; core's forward writes into it."""
    return torch.randn(1, PROMPT, width, generator=torch.Generator().manual_seed(5))


def write(host, model: Any, settings: Any, options: dict[str, Any], **sampling: Any) -> list[int]:
    """What our loop writes."""
    return host.generating.generate_text(model, settings, embeddings(), max_length=LENGTH, **options, **sampling)


def core_writes(host, model: Any, options: dict[str, Any], **sampling: Any) -> list[int]:
    """What core's loop writes."""
    return host.core(model, embeddings(), max_length=LENGTH, **options, **sampling)


@pytest.fixture(scope="module")
def built(host):
    """Every family's tiny model."""
    return {name: build(host, name) for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_are_cores(host, built, name):
    model, options = built[name]
    wanted = core_writes(host, model, options, do_sample=False)
    assert write(host, model, host.full, options, do_sample=False) == wanted
    assert len(wanted) == LENGTH


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("changes", [{}, {"top_k": 0}, {"top_p": 1.0, "min_p": 0.0}])
def test_the_same_seed_draws_what_core_draws(host, built, name, changes):
    model, options = built[name]
    for seed in (5, 6):
        sampling = {**SAMPLED, **changes, "seed": seed}
        wanted = core_writes(host, model, options, **sampling)
        assert write(host, model, host.full, options, **sampling) == wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_weights_write_the_same(host, built, name, caplog):
    """A hook on one linear, as a LoRA by bypass has: the modules are called as core calls them."""
    model, options = built[name]
    wanted = write(host, model, host.full, options, do_sample=False)
    linear = next(module for module in model.model.layers[0].modules() if isinstance(module, torch.nn.Linear))
    calls: list[int] = []
    handle = linear.register_forward_hook(lambda *_: calls.append(1))
    try:
        assert write(host, model, host.full, options, do_sample=False) == wanted
    finally:
        handle.remove()
    assert len(calls) == LENGTH  # the prompt's forward, and every token but the last


def _embeddings_in_8_bits(host, name: str, table: torch.Tensor, storage: str, dtype: torch.dtype) -> Any:
    """Core's module for a table stored in 8 bits that a file describes, `dtype` what core says it computes in."""
    import comfy.ops

    from lowbit.ops.formats import STORAGES
    from lowbit.ops.quantize import core_config, core_config_tensor, quantize_weight

    operations = comfy.ops.mixed_precision_ops({}, dtype, full_precision_mm=True)
    if "Gemma" in name:
        module = host.llama._make_scaled_embedding(operations, *table.shape, 8.0, "cpu", torch.float32)
    else:
        module = operations.Embedding(*table.shape, device="cpu", dtype=torch.float32)
    config = core_config_tensor(core_config(STORAGES[storage], fast=False))
    module.load_state_dict(quantize_weight(table, storage) | {"comfy_quant": config}, assign=True)
    return module


@pytest.mark.parametrize("streamed", [False, True], ids=["held", "streamed"])
@pytest.mark.parametrize(
    ("storage", "dtype"),
    [("int8", torch.float32), ("float8_e4m3fn", torch.float32), ("float8_e4m3fn", torch.float8_e4m3fn)],
    ids=["int8", "fp8", "all fp8"],
)
@pytest.mark.parametrize("name", ["Qwen3", "Qwen3 8B", "Gemma 3"])
def test_embeddings_in_8_bits_write_what_their_values_write(host, name, storage, dtype, streamed):
    """A file whose every tensor is FP8 has core take that for the dtype that it computes in."""
    model, options = build(host, name)
    plain = model.model.embed_tokens
    packed = _embeddings_in_8_bits(host, name, plain.weight.data, storage, dtype)
    plain.weight.data = decode_reference(stored_weight(packed.weight), torch.float32)
    wanted = write(host, model, host.full, options, do_sample=False)
    model.model.embed_tokens = packed
    if streamed:
        model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: None)
    assert write(host, model, host.full, options, do_sample=False) == wanted


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("Gemma 4")])
def test_heavy_hitters_that_hold_everything_are_the_full_cache(host, built, name):
    model, options = built[name]
    wanted = core_writes(host, model, options, do_sample=False)
    assert write(host, model, host.heavy(PROMPT + 3, LENGTH), options, do_sample=False) == wanted
    assert len(write(host, model, host.heavy(3, 2), options, do_sample=False)) == LENGTH


def test_gemma_4_keeps_the_full_cache_and_says_so(host, built, caplog):
    model, options = built["Gemma 4 E"]
    wanted = core_writes(host, model, options, do_sample=False)
    assert write(host, model, host.heavy(3, 2), options, do_sample=False) == wanted
    assert "keeps the full key-value cache" in caplog.text


@pytest.mark.parametrize("place", [0, 1, 10])
def test_a_stop_token_ends_the_text_at_once(host, built, place):
    model, options = built["Qwen3 8B"]
    written = write(host, model, host.full, options, do_sample=False)
    stop = written[place]
    wanted = written[: written.index(stop) + 1]
    assert write(host, model, host.full, {**options, "stop_tokens": [stop]}, do_sample=False) == wanted


def test_an_interrupt_ends_the_text(host, built):
    import comfy.model_management as core

    model, options = built["Qwen3"]
    core.interrupt_current_processing(True)
    try:
        with pytest.raises(core.InterruptProcessingException):
            write(host, model, host.full, options, do_sample=False)
    finally:
        core.interrupt_current_processing(False)


def test_the_progress_bar_counts_every_token(host, built, monkeypatch):
    import comfy.utils

    counted: list[int] = []
    bar = types.SimpleNamespace(update=counted.append)
    monkeypatch.setattr(comfy.utils, "ProgressBar", lambda total: bar)
    model, options = built["Qwen3"]
    write(host, model, host.full, options, do_sample=False)
    assert sum(counted) == LENGTH


def test_kernels_are_launched_on_the_gpu_that_the_model_is_on(host, built, monkeypatch):
    """Another one may be the current one."""
    current: list[torch.device] = []

    @contextlib.contextmanager
    def made_current(device):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(host.generating, "current_gpu", made_current)
    for name in ("_run_prompt", "generate"):
        function = getattr(host.generating, name)
        monkeypatch.setattr(
            host.generating, name, lambda *args, _f=function, **named: current[0] and _f(*args, **named)
        )
    model, options = built["Qwen3"]
    assert len(write(host, model, host.full, options, do_sample=False)) == LENGTH


def test_more_than_one_prompt_goes_to_cores_loop(host, built, caplog):
    model, options = built["Qwen3"]
    both = embeddings().repeat(2, 1, 1)
    wanted = host.core(model, both.clone(), do_sample=False, max_length=4, **options)
    got = host.generating.generate_text(model, host.full, both.clone(), do_sample=False, max_length=4, **options)
    assert got == wanted
    assert "core's own loop: there is more than one prompt" in caplog.text


def test_an_unknown_model_goes_to_cores_loop(host, built, caplog):
    model, options = built["Qwen3"]
    kind = model.model.__class__
    model.model.__class__ = type("Unknown", (kind,), {})
    try:
        assert len(write(host, model, host.full, options, do_sample=False)) == LENGTH
    finally:
        model.model.__class__ = kind
    assert "core's own loop: this model is of a family" in caplog.text


def test_settings_travel_with_clones_and_touch_nothing_else(host, built):
    import comfy.model_patcher

    model, _ = built["Qwen3"]
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    import comfy.sd

    clip = comfy.sd.CLIP(no_init=True)
    clip.patcher, clip.cond_stage_model, clip.tokenizer, clip.layer_idx = patcher, model, None, None
    clip.tokenizer_options, clip.use_clip_schedule, clip.apply_hooks_to_conds = {}, False, None
    ours = host.route.install_settings(clip, host.full)
    assert host.route.find_settings(ours.clone()) == host.full
    assert host.route.find_settings(clip) is None
    assert ours.patcher.clone_has_same_weights(clip.patcher)
    with host.route.decoding_here(model, host.full):
        assert "generate" in vars(model)
    assert "generate" not in vars(model)


def test_qwen25_without_its_head_is_refused(host):
    model = object.__new__(host.llama.Qwen25_7BVLI)
    torch.nn.Module.__init__(model)
    model.model = torch.nn.Identity()
    with pytest.raises(CapabilityError, match="no output head"):
        host.generating.check_head(model)
    assert host.generating.stop_tokens(model, None) == {151643, 151645}


def test_a_model_that_ends_before_its_last_layer_is_refused(host):
    """As core's Qwen3-VL 32B of MiniMax-H3 does: what comes out of it is no next token."""
    model = _part(host, host.llama.Qwen3VL_32BConfig(**SMALL), *host.llama.Qwen3_8B.__mro__[1:4], torch.nn.Module)
    with pytest.raises(CapabilityError, match="cut off before its last layer"):
        host.generating.generate_text(model, host.full, embeddings())


def test_a_checkpoint_without_a_text_encoder_is_told_so(host):
    with pytest.raises(CapabilityError, match="no CLIP to write with"):
        host.route.install_settings(None, host.full)


def test_an_encoder_that_cannot_write_is_named(host):
    with (
        pytest.raises(CapabilityError, match="Linear only encodes prompts"),
        host.route.decoding_here(torch.nn.Linear(2, 2), host.full),
    ):
        pass


def test_a_model_that_makes_nan_is_refused(host):
    model, options = build(host, "Qwen3")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(CheckpointError, match="NaN of this prompt"):
        write(host, model, host.full, options, do_sample=False)


def test_every_argument_of_cores_generate_is_known(host):
    """And used, but for the least number of tokens, which core does not use either."""
    import inspect

    used = {
        *("embeds", "initial_input_ids", "position_ids", "embeds_info", "deepstack_embeds", "visual_pos_masks"),
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "seed"),
        *("initial_tokens", "stop_tokens", "max_length", "execution_dtype"),
    }
    assert set(inspect.signature(host.core).parameters) == used | {"self", "min_tokens"}
