"""Claims about writing without ComfyUI: the tokens of transformers' own models, from the same files."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.cli import main
from lowbit.errors import CheckpointError, FormatError
from lowbit.ops.formats import find_format
from lowbit.ops.quantize import quantize_weight
from lowbit.text.architecture import read_architecture
from lowbit.text.caches import HEAVY_HITTERS, CachePolicy
from lowbit.text.sampling import Sampling
from lowbit.text.writer import Writer, load_tokenizer

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
COMMON = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
PROMPT, LENGTH = list(range(5, 17)), 20


def config_of(kind: str):
    """A tiny configuration of a family, with habits of its own."""
    makers = {
        "llama": lambda: transformers.LlamaConfig(**COMMON, tie_word_embeddings=False, rope_theta=500.0),
        "qwen2": lambda: transformers.Qwen2Config(**COMMON, tie_word_embeddings=True),
        "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=32, tie_word_embeddings=False),
        "gemma3_text": lambda: transformers.Gemma3TextConfig(
            **COMMON, head_dim=32, sliding_window=6, query_pre_attn_scalar=48, eos_token_id=None
        ),
    }
    return makers[kind]()


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "gemma3_text"])
def folder(request, tmp_path_factory):
    """A Hugging Face folder with seeded weights, and transformers' model."""
    torch.manual_seed(0)
    config = config_of(request.param)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(8)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return path, model


def test_greedy_tokens_are_transformers(folder):
    path, model = folder
    options = {"do_sample": False, "max_new_tokens": LENGTH, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(torch.tensor([PROMPT]), **options)[0, len(PROMPT) :].tolist()
    writer = Writer.load(path, None, CPU)
    assert writer.write(PROMPT, LENGTH, Sampling(), CachePolicy(), stop_tokens=()) == wanted
    everything = CachePolicy(HEAVY_HITTERS, len(PROMPT), LENGTH)
    assert writer.write(PROMPT, LENGTH, Sampling(), everything, stop_tokens=()) == wanted


def test_perplexity_is_that_of_the_logits(folder):
    path, model = folder
    text = torch.randint(0, 200, (30,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(text[None]).logits[0, 9:-1]
    expected = torch.nn.functional.cross_entropy(logits, text[10:]).exp().item()
    writer = Writer.load(path, None, CPU)
    assert writer.perplexity(text.tolist(), 10, CachePolicy()) == pytest.approx(expected, rel=1e-4)
    little = writer.perplexity(text.tolist(), 10, CachePolicy(HEAVY_HITTERS, 2, 1))
    assert little != pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("folder", ["qwen3"], indirect=True)
def test_kernels_are_launched_on_the_gpu_that_the_model_is_on(folder, monkeypatch):
    """Another one may be the current one: `--device cuda:1`."""
    from lowbit.text import writer as module

    made = Writer.load(folder[0], None, CPU)
    monkeypatch.setattr(module, "run_prompt", lambda *args: (_ for _ in ()).throw(RuntimeError(*current)))
    current: list[torch.device] = []
    monkeypatch.setattr(module, "current_gpu", lambda device: current.append(device) or contextlib.nullcontext())
    for call in (
        lambda: made.write(PROMPT, 5, Sampling(), CachePolicy()),
        lambda: made.perplexity(PROMPT, 2, CachePolicy()),
    ):
        current.clear()
        with pytest.raises(RuntimeError, match="cpu"):
            call()


def test_quantized_weights_write_nearly_the_same_logits(folder):
    from lowbit.text.prompt import run_prompt

    path, _ = folder
    made = []
    with torch.inference_mode():
        for format in (None, "int8", "fp8_e4m3fn_scaled"):
            writer = Writer.load(path, None if format is None else find_format(format), CPU)
            made.append(run_prompt(writer.model, writer.architecture, torch.tensor(PROMPT), 1, CachePolicy()))
    for logits in made[1:]:
        assert 1e-4 < (logits - made[0]).norm() / made[0].norm() < 0.2


@pytest.mark.parametrize("folder", ["qwen3"], indirect=True)
def test_a_text_encoder_file_writes_like_its_folder(tmp_path, folder):
    from lowbit.ops.checkpoint import open_checkpoint
    from lowbit.ops.plan import make_plan
    from lowbit.ops.stream import quantize_checkpoint

    path, model = folder
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "plain.safetensors")
    source = open_checkpoint(tmp_path / "plain.safetensors")
    plan = make_plan(source, find_format("int8"), None)
    quantize_checkpoint(source, plan, tmp_path / "int8.safetensors", device="cpu")
    whole = Writer.load(path, None, CPU)
    # transformers' default base of the rotation is 10,000; that of the real models is a million.
    file = Writer.load(tmp_path / "plain.safetensors", None, CPU)
    assert file.architecture.theta == 1e6
    assert file.architecture.heads == whole.architecture.heads
    assert len(file.write(PROMPT, 5, Sampling(), CachePolicy())) == 5
    assert len(Writer.load(tmp_path / "int8.safetensors", None, CPU).write(PROMPT, 5, Sampling(), CachePolicy())) == 5


@pytest.mark.parametrize(
    ("change", "said"),
    [({"model_type": "mamba"}, "'mamba', which"), ({"rope_scaling": {"rope_type": "yarn"}}, "rotation as 'yarn'")],
)
def test_what_is_unknown_is_refused(change, said):
    config = config_of("llama").to_dict() | {"rope_parameters": None} | change
    with pytest.raises(CheckpointError, match=said):
        read_architecture(config, "model")


def other_files(folder: Path, target: Path, change: Callable[[dict], dict], **configuration: Any) -> Path:
    """A copy of a folder with other tensors, and other entries in its configuration (None: without)."""
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text()) | configuration
    (target / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    save_file(change(load_file(folder / "model.safetensors")), target / "model.safetensors")
    return target


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_the_head_of_a_model_that_sees_lies_beside_its_language_model(folder, tmp_path):
    """As in LLaVA's folders: the embeddings are not the head."""
    path, _ = folder
    inside = json.loads((path / "config.json").read_text())
    under = other_files(
        path,
        tmp_path / "sees",
        lambda tensors: {f"language_model.{name}": tensor for name, tensor in tensors.items()},
        model_type="llava",
        text_config=inside,
    )
    plain, sees = (Writer.load(one, None, CPU).write(PROMPT, 8, Sampling(), CachePolicy()) for one in (path, under))
    assert plain == sees


def _without(name: str) -> Callable[[dict], dict]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def _too_wide(tensors: dict) -> dict:
    """A block format, which would be cut to the size of the layer."""
    name = "model.layers.1.mlp.down_proj"
    parts = quantize_weight(torch.randn(64, 128), "mxfp8")
    return _without(f"{name}.weight")(tensors) | {f"{name}.{suffix}": part for suffix, part in parts.items()}


@pytest.mark.parametrize("folder", ["qwen3"], indirect=True)
@pytest.mark.parametrize(
    ("change", "configuration", "said"),
    [
        (_without("lm_head.weight"), {}, "no output head"),
        (_without("lm_head.weight"), {"tie_word_embeddings": None}, "no output head"),
        (_without("model.layers.1.mlp.gate_proj.weight"), {}, "no 'model.layers.1.mlp.gate_proj.weight'"),
        (_too_wide, {}, "'model.layers.1.mlp.down_proj.weight' is 64 x 128 where the configuration says 64 x 96"),
        (dict, {"num_hidden_layers": 2}, "more than the 2 layers"),
        (dict, {"num_hidden_layers": 4}, "no 'model.layers.3."),
        (dict, {"head_dim": 16}, "128 x 64 where the configuration says 64 x 64"),
        (dict, {"hidden_size": 32}, "where the configuration says"),
        (dict, {"num_key_value_heads": 4}, "where the configuration says 128 x 64"),
        (dict, {"num_attention_heads": None}, "says no 'num_attention_heads'"),
        (dict, {"hidden_size": "wide"}, "cannot be read"),
        (dict, {"hidden_act": "relu"}, "activation 'relu'"),
        (dict, {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' of 0.5"),
        (dict, {"model_type": ""}, "of a family that its configuration does not name"),
    ],
)
def test_a_folder_that_does_not_fit_itself_is_refused(folder, tmp_path, change, configuration, said):
    other = other_files(folder[0], tmp_path / "other", change, **configuration)
    with pytest.raises(CheckpointError, match=said):
        Writer.load(other, None, CPU)


def test_a_model_that_makes_nan_is_refused(folder, tmp_path):
    def damage(tensors: dict) -> dict:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
        return tensors

    other = other_files(folder[0], tmp_path / "other", damage)
    with pytest.raises(CheckpointError, match="NaN of this prompt"):
        Writer.load(other, None, CPU).write(PROMPT, 5, Sampling(), CachePolicy())


def test_tokens_of_another_model_are_refused(folder):
    with pytest.raises(FormatError, match=r"token 200 .* has 200"):
        Writer.load(folder[0], None, CPU).write([5, 200], 5, Sampling(), CachePolicy())


@pytest.mark.parametrize("folder", ["qwen3"], indirect=True)
def test_a_file_with_quantized_embeddings_writes_what_their_values_write(folder, tmp_path):
    from lowbit.ops.formats import STORAGES
    from lowbit.ops.quantize import assemble, core_config, core_config_tensor, quantize_weight

    name, storage = "model.embed_tokens", "float8_e4m3fn"
    config = core_config_tensor(core_config(STORAGES[storage], fast=False))

    def change(tensors: dict, packed: bool) -> dict:
        weight = tensors[f"{name}.weight"]
        parts = quantize_weight(weight, storage)
        if packed:
            return tensors | {f"{name}.{suffix}": part for suffix, part in (parts | {"comfy_quant": config}).items()}
        return tensors | {f"{name}.weight": assemble(parts, storage, weight.shape, torch.float32).dequantize()}

    texts = []
    for packed in (False, True):
        other = other_files(folder[0], tmp_path / str(packed), lambda tensors, packed=packed: change(tensors, packed))
        texts.append(Writer.load(other, None, CPU).write(PROMPT, LENGTH, Sampling(), CachePolicy()))
    assert texts[0] == texts[1]


def test_layers_that_slide_are_those_of_transformers():
    """Qwen's do not unless it is said, and then from one on."""
    common = {**COMMON, "num_hidden_layers": 4, "sliding_window": 8}
    for options in ({}, {"use_sliding_window": True, "max_window_layers": 2}):
        config = transformers.Qwen2Config(**common, **options)
        said = config.to_dict() | {"layer_types": None, "use_sliding_window": options.get("use_sliding_window")}
        said = {key: value for key, value in said.items() if value is not None}
        wanted = tuple(8 if kind == "sliding_attention" else None for kind in config.layer_types)
        assert read_architecture(said | {"sliding_window": 8}, "model").window == wanted


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_the_command_line_writes(folder, tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers

    path, _ = folder
    words = {f"w{number}": number for number in range(200)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    command = ["generate", str(path), "--prompt", "w5 w6 w7", "--max-length", "6", "--device", "cpu"]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert len(first.split()) == 6
    assert main([*command, "--format", "int8", "--kv-cache", "heavy_hitters", "--window", "3"]) == 0
    assert len(capsys.readouterr().out.split()) == 6
    sampled = [*command, "--temperature", "1.0", "--top-k", "50", "--seed"]
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*sampled, seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert main([*command[:2], "--prompt", "", "--device", "cpu"]) == 2
    assert "The prompt is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("temperature", "nan", "'nan' is no number from 0 to 100"),
        ("temperature", "-1", "no number from 0"),
        ("top-p", "2", "no number from 0 to 1"),
        ("top-k", "-5", "no whole number from 0"),
        ("seed", "9" * 30, "no whole number from 0"),
        ("max-length", "0", "no whole number from 1"),
        ("max-length", "10000000000000", "no whole number from 1"),
        ("window", "x", "'x' is no whole number"),
    ],
)
def test_numbers_out_of_their_range_are_refused(tmp_path, option, value, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(tmp_path), "--prompt", "x", f"--{option}", value])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("further", [[], ["--tokenizer", "."]])
def test_a_file_of_a_model_that_cannot_write_is_not_sent_for_its_folder(tmp_path, further, capsys):
    save_file({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(16, 16)}, tmp_path / "t5.safetensors")
    assert main(["generate", str(tmp_path / "t5.safetensors"), "--prompt", "x", "--device", "cpu", *further]) == 2
    said = "t5.safetensors is neither a Qwen2.5 nor a Qwen3 text encoder: use one of these, or the Hugging Face folder of one of llama,"
    assert said in capsys.readouterr().err


def test_a_model_that_is_not_there_is_one_sentence(tmp_path, capsys):
    assert main(["generate", str(tmp_path / "qwen"), "--prompt", "x"]) == 2
    assert "qwen does not exist" in capsys.readouterr().err


def test_a_tokenizer_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match=r"qwen does not exist: check its name\.$"):
        load_tokenizer(tmp_path / "qwen")


@pytest.mark.parametrize(
    ("files", "said"),
    [({}, "is not a model's configuration"), ({"config.json": {"model_type": "llama"}}, "no model.safetensors")],
)
def test_a_broken_folder_is_one_sentence(tmp_path, files, said, capsys):
    (tmp_path / "tokenizer.json").write_text("{}")
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert main(["generate", str(tmp_path), "--prompt", "x", "--device", "cpu"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("lowbit: ")
    assert len(files) == 0 or said in message or "tokenizer" in message
