"""Writes text with a model on disk, without ComfyUI: a Hugging Face folder or a ComfyUI text encoder file."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CapabilityError, CheckpointError, FormatError
from ..kernels.runtime import current_gpu
from ..ops.checkpoint import Checkpoint, open_checkpoint
from ..ops.formats import WeightFormat
from .architecture import Architecture, guess_architecture, read_architecture, read_configuration
from .caches import CachePolicy
from .decoder import Decoder, Model
from .loop import generate
from .prompt import run_prompt
from .reading import Reader
from .sampling import Sampler, Sampling, check_logits

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass
class Writer:
    """A model in memory, and what it is built like.

    Attributes:
        model: the decoder.
        architecture: its sizes.
        device: where it is.
    """

    model: Model
    architecture: Architecture
    device: torch.device

    @classmethod
    def load(cls, path: Path, weight_format: WeightFormat | None, device: torch.device) -> Writer:
        """Read the model at `path`, its linears stored in `weight_format` (None: as they are).

        Args:
            path: a Hugging Face folder, or a text encoder file as ComfyUI has it.
            weight_format: of the linears that the file has in 16 or 32 bits.
            device: where to.

        Raises:
            CheckpointError: it is neither, or of an unknown family.
        """
        checkpoint = open_model(path)
        if path.is_dir():
            architecture = read_architecture(read_configuration(path), path.name)
        else:
            architecture = guess_architecture(checkpoint)
        return cls.build(checkpoint, architecture, weight_format, device)

    @classmethod
    @torch.inference_mode()
    def build(
        cls,
        checkpoint: Checkpoint,
        architecture: Architecture,
        weight_format: WeightFormat | None,
        device: torch.device,
    ) -> Writer:
        """The model of a checkpoint, its residual stream in bfloat16 on a GPU and in float32 on the CPU."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return cls(Reader(checkpoint, architecture, weight_format, device, dtype).model(), architecture, device)

    @torch.inference_mode()
    def write(
        self,
        tokens: list[int],
        most: int,
        sampling: Sampling,
        policy: CachePolicy,
        *,
        stop_tokens: tuple[int, ...] | None = None,
        graph: bool = True,
        seen: Callable[[int], None] = lambda count: None,
    ) -> list[int]:
        """The tokens that follow `tokens`, `most` at most, the stop token among them.

        Raises:
            FormatError: there are none to follow, or they are no tokens of this model.
            CheckpointError: the model makes NaN of them.
        """
        if not tokens:
            raise FormatError("The prompt is empty, or its tokenizer makes no tokens of it: write something to answer.")
        known = self.model.vocabulary
        if known is not None and max(tokens) >= known:
            raise FormatError(
                f"The tokenizer makes token {max(tokens)} of the prompt, but the model has {known}: it is another model's."
            )
        with current_gpu(self.device):
            prompt = torch.tensor(tokens, device=self.device)
            logits = run_prompt(self.model, self.architecture, prompt, most, policy)[-1:]
            check_logits(logits)
            sampler = Sampler(sampling, logits.shape[-1], self.device)
            decoder = Decoder(self.model, sampler, sampler.draw(logits), most)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seen(1)
            stops = self.architecture.stop_tokens if stop_tokens is None else stop_tokens
            return generate(decoder, set(stops), graph=graph, seen=seen)

    @torch.inference_mode()
    def perplexity(self, tokens: list[int], prompt: int, policy: CachePolicy, graph: bool = True) -> float:
        """exp of the mean negative log-likelihood of the tokens after the first `prompt`, each fed in turn.

        The cache evicts as it does when a text is written, so it shows what a policy costs.
        """
        device = self.device
        with current_gpu(device):
            text = torch.tensor(tokens, device=device)
            logits = run_prompt(self.model, self.architecture, text[:prompt], len(tokens) - prompt, policy)[-1:]
            sampler = _Forced(text[prompt:], logits.shape[-1], device)
            decoder = Decoder(self.model, sampler, sampler.draw(logits), len(tokens) - prompt)
            generate(decoder, set(), graph=graph)
            return float((sampler.total / sampler.count).exp())


class _Forced(Sampler):
    """Draws a given text, and adds up how unlikely it was."""

    def __init__(self, text: torch.Tensor, vocabulary: int, device: torch.device) -> None:
        super().__init__(Sampling(), vocabulary, device)
        self.text = text
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        token = self.text.index_select(0, self.count).view(1, 1)
        self.total -= logits.float().log_softmax(dim=-1).gather(1, token)[0, 0]
        self.count += 1
        return token


def open_model(path: Path) -> Checkpoint:
    """The weights of a Hugging Face folder, or the file itself.

    Raises:
        CheckpointError: there are none.
    """
    if not path.is_dir():
        return open_checkpoint(path)
    found = next((path / name for name in _WEIGHTS if (path / name).exists()), None)
    if found is None:
        raise CheckpointError(f"{path} holds no model.safetensors: download the folder again.")
    return open_checkpoint(found)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a Hugging Face folder.

    Raises:
        CapabilityError: transformers is not installed.
        CheckpointError: the folder does not exist, or has no tokenizer.
    """
    if not folder.exists():
        # Or transformers would speak of a network that it is not to ask.
        raise CheckpointError(f"{folder} does not exist: check its name.")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise CapabilityError(
            "Writing text needs the package 'transformers' for its tokenizers: install it with 'pip install transformers'."
        ) from None
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever its many parsers raise
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise CheckpointError(
            f"{folder} has no tokenizer that can be read ({reason}): name one by --tokenizer."
        ) from None


def encode(tokenizer: Any, text: str, raw: bool) -> list[int]:
    """Tokens of a prompt: as the user's turn of a chat, where the model has a template and `raw` is not set."""
    if raw or not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(text)["input_ids"])
    turn = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=False))


@dataclass
class Stopwatch:
    """When the first token came and how many there are.

    Attributes:
        started, first: seconds of the clock.
        count: tokens so far.
    """

    started: float
    first: float = 0.0
    count: int = 0

    @classmethod
    def start(cls) -> Stopwatch:
        """From now."""
        return cls(time.perf_counter())

    def seen(self, count: int) -> None:
        """`count` more tokens are there."""
        if not self.count:
            self.first = time.perf_counter() - self.started
        self.count += count

    @property
    def rate(self) -> float:
        """Tokens a second after the first."""
        passed = time.perf_counter() - self.started - self.first
        return (self.count - 1) / passed if self.count > 1 and passed > 0 else 0.0
