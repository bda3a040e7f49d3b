"""Files as nunchaku has them, made of a model in ComfyUI's names: layers fused, renamed and packed for its kernels.

Where each number lies is computed from its row and column, after deepcompressor's backend/nunchaku/utils.py
(`NunchakuWeightPacker`) and backend/tinychat/utils.py (`pack_w4`); nothing here is shared with ops/nunchaku_decode.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from lowbit.ops.nunchaku_names import MODELS

from .tensors import Tensors

GELU_SHIFT = 0.171875
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def _grid(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    return row, column


def _placed(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    flat = np.empty(places.size, values.dtype)
    flat[places] = values
    return flat


def pack_codes(codes: np.ndarray) -> torch.Tensor:
    """4-bit codes (n, k) as int8 (n, k / 2): registers of 8 in k, tiles of 128 x 64."""
    n, k = _grid(*codes.shape)
    place = n // 128 * (codes.shape[1] // 64) + k // 64
    place = ((place * 8 + n % 128 // 16) * 8 + n % 8) * 4 + k % 32 // 8
    place = ((place * 2 + n % 16 // 8) * 2 + k % 64 // 32) * 8 + k % 8
    flat = _placed(codes.astype(np.uint8) & 15, place)
    return torch.from_numpy((flat[::2] | (flat[1::2] << 4)).view(np.int8)).view(codes.shape[0], -1)


def pack_scales(scales: np.ndarray) -> np.ndarray:
    """16-bit scales (n, groups) as (groups, n): lanes of 0 1 8 9, 2 3 10 11, ..."""
    n, g = _grid(*scales.shape)
    place = (n // 128 * scales.shape[1] + g) * 8 + n % 128 // 16
    place = ((place * 4 + n % 8 // 2) * 2 + n % 16 // 8) * 2 + n % 2
    return _placed(scales, place).reshape(scales.shape[1], scales.shape[0])


def pack_small_scales(scales: np.ndarray) -> np.ndarray:
    """FP8 scales (n, groups) as (groups, n): lanes of 0 32 64 96, 8 40 72 104, ..., four groups in each."""
    n, g = _grid(*scales.shape)
    place = (n // 128 * (scales.shape[1] // 4) + g // 4) * 8 + n % 8
    place = ((place * 4 + n % 32 // 8) * 4 + n % 128 // 32) * 4 + g % 4
    return _placed(scales, place).reshape(scales.shape[1], scales.shape[0])


def pack_low_rank(weight: np.ndarray, down: bool) -> np.ndarray:
    """The projection down (rank, channels) or up (channels, rank) as (channels, rank)."""
    n, k = _grid(*weight.shape)
    rank, channel = (n, k) if down else (k, n)
    ranks = weight.shape[0] if down else weight.shape[1]
    place = (channel // 16 * (ranks // 16) + rank // 16) * 8 + n % 8
    place = ((place * 4 + k % 8 // 2) * 2 + n % 16 // 8) * 2 + k % 16 // 8
    return _placed(weight, place * 2 + k % 2).reshape(-1, ranks)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).bfloat16().float().numpy()


def svdquant(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    fp4: bool,
    shifted: bool = False,
    rank: int = 16,
    older: bool = False,
) -> tuple[Tensors, torch.Tensor]:
    """A layer of `svdquant` by suffix, and the weight that it stands for.

    Args:
        weight, bias: of the layer.
        fp4: NVFP4, else INT4.
        shifted: its input is a GELU's output, to which the kernel of INT4 adds a number.
        rank: of the part in 16 bits.
        older: with the suffixes of older files.
    """
    random = np.random.default_rng(5)
    values = weight.double().numpy()
    rows, columns = values.shape
    smooth = _bfloat16(random.uniform(0.5, 2, columns))
    left, sizes, right = np.linalg.svd(values, full_matrices=False)
    up, down = (_bfloat16(part) for part in (left[:, :rank] * sizes[:rank], right[:rank]))
    rest = (values - up.astype(np.float64) @ down) * smooth
    size = 16 if fp4 else 64
    largest = np.abs(rest.reshape(rows, -1, size)).max(2) + 1e-6
    tensors: Tensors = {}
    if fp4:
        channel = _bfloat16(largest.max(1) / (448 * 6))
        whole = np.float32(0.75)
        factor = channel[:, None].astype(np.float64) * whole
        scale = torch.from_numpy(largest / 6 / factor).clamp(max=448).to(torch.float8_e4m3fn)
        spread = np.repeat(scale.double().numpy() * factor, size, 1)
        codes = np.abs(rest[..., None] / spread[..., None] - _E2M1).argmin(-1)
        exact = _E2M1[codes] * spread
        tensors["wscales"] = torch.from_numpy(pack_small_scales(scale.view(torch.uint8).numpy())).view(scale.dtype)
        tensors["wcscales"] = torch.from_numpy(pack_scales(channel[:, None])).view(-1).bfloat16()
        tensors["wtscale"] = torch.tensor([whole])
    else:
        scale16 = _bfloat16(largest / 7)
        spread = np.repeat(scale16.astype(np.float64), size, 1)
        codes = np.clip((rest / spread).round(), -8, 7).astype(np.int64)
        exact = codes * spread
        tensors["wscales"] = torch.from_numpy(pack_scales(scale16)).bfloat16()
    exact = exact / smooth
    names = ("lora_down", "lora_up", "smooth") if older else ("proj_down", "proj_up", "smooth_factor")
    tensors |= {
        "qweight": pack_codes(codes),
        names[0]: torch.from_numpy(pack_low_rank(down, True)).bfloat16(),
        names[1]: torch.from_numpy(pack_low_rank(up, False)).bfloat16(),
        names[2]: torch.from_numpy(pack_scales(smooth[:, None])).view(-1).bfloat16(),
        f"{names[2]}_orig": torch.ones(columns).bfloat16(),
    }
    if bias is not None:
        stored = bias.double().numpy() - (exact.sum(1) * GELU_SHIFT if shifted and not fp4 else 0)
        tensors["bias"] = torch.from_numpy(pack_scales(_bfloat16(stored)[:, None])).view(-1).bfloat16()
    return tensors, torch.from_numpy(exact + up.astype(np.float64) @ down)


def awq_four_rows(
    weight: torch.Tensor,
    group: int = 64,
    names: tuple[str, str] = ("wscales", "wzeros"),
    dtype: torch.dtype = torch.int32,
) -> tuple[Tensors, torch.Tensor]:
    """A layer of W4A16 by suffix, and the weight that it stands for."""
    values = weight.double().numpy()
    rows, columns = values.shape
    grouped = values.reshape(rows, -1, group)
    low, high = grouped.min(2), grouped.max(2)
    scale, zero = _bfloat16((high - low) / 15 + 1e-6), _bfloat16(low)
    spread, moved = (np.repeat(numbers.astype(np.float64), group, 1) for numbers in (scale, zero))
    codes = np.clip(((values - moved) / spread).round(), 0, 15).astype(np.uint16)
    n, k = _grid(rows, columns)
    place = ((n // 4 * (columns // 64) + k // 64) * 4 + n % 4) * 16 + k % 64 // 32 * 8 + k % 8
    packed = np.zeros(rows * columns // 4, np.uint16)
    np.bitwise_or.at(packed, place.reshape(-1), (codes << (4 * (k % 32 // 8)).astype(np.uint16)).reshape(-1))
    halves = torch.from_numpy(packed.view(np.int16)).view(rows // 4, columns)
    tensors = {
        "qweight": halves.view(dtype),
        names[0]: torch.from_numpy(scale.T.copy()).bfloat16(),
        names[1]: torch.from_numpy(zero.T.copy()).bfloat16(),
    }
    return tensors, torch.from_numpy(codes * spread + moved)


def modulation(weight: torch.Tensor, bias: torch.Tensor, count: int) -> Tensors:
    """A modulation's rows in turn, one of each of `count` outputs, and 1 added to the bias of each scale."""
    parts = bias.float().chunk(count)
    bias = torch.stack([part + 1 if number % 3 == 1 else part for number, part in enumerate(parts)], 1)
    weight = torch.stack(weight.chunk(count), 1).flatten(0, 1)
    return awq_four_rows(weight)[0] | {"bias": bias.flatten().bfloat16()}


class _File:
    """Collects the tensors of a file, taking those of the model away."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], fp4: bool, older: bool):
        self.left, self.fp4, self.older = dict(tensors), fp4, older
        self.made: Tensors = {}

    def take(self, layer: str, suffix: str = "weight") -> torch.Tensor | None:
        return self.left.pop(f"{layer}.{suffix}", None)

    def packed(self, theirs: str, ours: tuple[str, ...], shifted: bool = False) -> None:
        """One layer of svdquant, of rows of several."""
        weights, biases = ([self.take(layer, suffix) for layer in ours] for suffix in ("weight", "bias"))
        self.add(theirs, torch.cat(weights), None if biases[0] is None else torch.cat(biases), shifted)

    def add(self, theirs: str, weight: torch.Tensor, bias: torch.Tensor | None, shifted: bool = False) -> None:
        parts, _ = svdquant(weight, bias, fp4=self.fp4, shifted=shifted, older=self.older)
        self.made |= {f"{theirs}.{suffix}": part for suffix, part in parts.items()}

    def modulated(self, theirs: str, ours: str, count: int) -> None:
        parts = modulation(self.take(ours), self.take(ours, "bias"), count)
        self.made |= {f"{theirs}.{suffix}": part for suffix, part in parts.items()}

    def renamed(self, theirs: str, ours: str, weight: str = "weight") -> None:
        for suffix, other in (("weight", weight), ("bias", "bias")):
            tensor = self.take(ours, other)
            if tensor is not None:
                self.made[f"{theirs}.{suffix}"] = tensor

    def whole(self) -> Tensors:
        return self.left | self.made


def qwen_image(tensors: Mapping[str, torch.Tensor], fp4: bool = False) -> Tensors:
    """A Qwen-Image as nunchaku has it."""
    file = _File(tensors, fp4, older=False)
    for block in sorted({".".join(name.split(".")[:2]) for name in tensors if name.startswith("transformer_blocks.")}):
        attention = f"{block}.attn"
        file.packed(f"{attention}.to_qkv", tuple(f"{attention}.to_{part}" for part in "qkv"))
        file.packed(f"{attention}.add_qkv_proj", tuple(f"{attention}.add_{part}_proj" for part in "qkv"))
        for layer in ("attn.to_out.0", "attn.to_add_out", "img_mlp.net.0.proj", "txt_mlp.net.0.proj"):
            file.packed(f"{block}.{layer}", (f"{block}.{layer}",))
        for stream in ("img", "txt"):
            file.packed(f"{block}.{stream}_mlp.net.2", (f"{block}.{stream}_mlp.net.2",), shifted=True)
            file.modulated(f"{block}.{stream}_mod.1", f"{block}.{stream}_mod.1", 6)
    return file.whole()


def flux(tensors: Mapping[str, torch.Tensor], fp4: bool = False, older: bool = True) -> Tensors:
    """A Flux as nunchaku has it, in the names of its older files or of its newer ones."""
    file = _File(tensors, fp4, older)
    width = tensors["img_in.weight"].shape[0]
    blocks = sorted(
        {tuple(name.split(".")[:2]) for name in tensors if name.startswith(("double_blocks.", "single_blocks."))}
    )
    norms, newer = "" if older else "attn.", MODELS["Flux"].stacks["transformer_blocks"].older
    for kind, number in blocks:
        ours = f"{kind}.{number}"
        if kind == "double_blocks":
            theirs = f"transformer_blocks.{number}"
            for stream, context, added in (("img", "", ""), ("txt", "_context", "added_")):
                for part, layer in (
                    (f"qkv_proj{context}", "attn.qkv"),
                    (f"out_proj{context}", "attn.proj"),
                    (f"mlp{context}_fc1", "mlp.0"),
                    (f"mlp{context}_fc2", "mlp.2"),
                ):
                    name = part if older else newer[part]
                    file.packed(f"{theirs}.{name}", (f"{ours}.{stream}_{layer}",), shifted=layer == "mlp.2")
                file.modulated(f"{theirs}.norm1{context}.linear", f"{ours}.{stream}_mod.lin", 6)
                for norm, letter in (("query", "q"), ("key", "k")):
                    name = f"{theirs}.{norms}norm_{added}{letter}"
                    file.renamed(name, f"{ours}.{stream}_attn.norm.{norm}_norm", _norm(tensors))
        else:
            theirs = f"single_transformer_blocks.{number}"
            first, second = (file.take(f"{ours}.{layer}") for layer in ("linear1", "linear2"))
            first_bias, second_bias = (file.take(f"{ours}.{layer}", "bias") for layer in ("linear1", "linear2"))
            file.add(f"{theirs}.{'qkv_proj' if older else 'attn.to_qkv'}", first[: 3 * width], first_bias[: 3 * width])
            file.add(f"{theirs}.mlp_fc1", first[3 * width :], first_bias[3 * width :])
            # The bias of the joined layer is that of both.
            file.add(f"{theirs}.{'out_proj' if older else 'attn.to_out'}", second[:, :width], second_bias * 0.25)
            file.add(f"{theirs}.mlp_fc2", second[:, width:], second_bias * 0.75, shifted=True)
            file.modulated(f"{theirs}.norm.linear", f"{ours}.modulation.lin", 3)
            for norm, letter in (("query", "q"), ("key", "k")):
                file.renamed(f"{theirs}.{norms}norm_{letter}", f"{ours}.norm.{norm}_norm", _norm(tensors))
    for theirs, ours in (("x_embedder", "img_in"), ("context_embedder", "txt_in"), ("proj_out", "final_layer.linear")):
        file.renamed(theirs, ours)
    for theirs, ours in (("timestep", "time_in"), ("text", "vector_in"), ("guidance", "guidance_in")):
        for number, layer in ((1, "in_layer"), (2, "out_layer")):
            file.renamed(f"time_text_embed.{theirs}_embedder.linear_{number}", f"{ours}.{layer}")
    for suffix in ("weight", "bias"):
        shift, scale = file.take("final_layer.adaLN_modulation.1", suffix).chunk(2)
        file.made[f"norm_out.linear.{suffix}"] = torch.cat([scale, shift])
    return file.whole()


def _norm(tensors: Mapping[str, torch.Tensor]) -> str:
    return "scale" if any(name.endswith("_norm.scale") for name in tensors) else "weight"


def z_image(tensors: Mapping[str, torch.Tensor], fp4: bool = False) -> Tensors:
    """A Z-Image as nunchaku has it, its refiners in 16 bits."""
    file = _File(tensors, fp4, older=False)
    blocks = sorted(
        {".".join(name.split(".")[:2]) for name in tensors if name.split(".")[1].isdigit()}
        - {"cap_embedder.0", "cap_embedder.1"}
    )
    for block in blocks:
        if not block.startswith(("layers.", "noise_refiner.", "context_refiner.")):
            continue
        attention, feed_forward = f"{block}.attention", f"{block}.feed_forward"
        gate, up = (file.take(f"{feed_forward}.{name}") for name in ("w1", "w3"))
        if block.startswith("layers."):
            file.packed(f"{attention}.to_qkv", (f"{attention}.qkv",))
            file.packed(f"{attention}.to_out.0", (f"{attention}.out",))
            file.add(f"{feed_forward}.net.0.proj", torch.cat([up, gate]), None)
            file.packed(f"{feed_forward}.net.2", (f"{feed_forward}.w2",))
        else:
            for part, rows in zip("qkv", file.take(f"{attention}.qkv").chunk(3), strict=True):
                file.made[f"{attention}.to_{part}.weight"] = rows.contiguous()
            file.renamed(f"{attention}.to_out.0", f"{attention}.out")
            file.made[f"{feed_forward}.net.0.proj.weight"] = torch.cat([up, gate])
            file.renamed(f"{feed_forward}.net.2", f"{feed_forward}.w2")
        for letter in "qk":
            file.renamed(f"{attention}.norm_{letter}", f"{attention}.{letter}_norm")
    file.renamed("all_x_embedder.2-1", "x_embedder")
    for layer in ("linear", "adaLN_modulation.1"):
        file.renamed(f"all_final_layer.2-1.{layer}", f"final_layer.{layer}")
    return file.whole()
