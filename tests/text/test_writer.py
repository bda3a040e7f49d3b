"""Claims about writing without ComfyUI: the tokens of transformers' own models, from the same files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from lowbit.cli import main
from lowbit.errors import CheckpointError
from lowbit.ops.formats import find_format
from lowbit.text.architecture import read_architecture
from lowbit.text.caches import HEAVY_HITTERS, CachePolicy
from lowbit.text.sampling import Sampling
from lowbit.text.writer import Writer

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
    assert "the prompt is empty" in capsys.readouterr().err


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
