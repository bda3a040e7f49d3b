"""A wav2vec2-base audio encoder with random weights: of the real size, because ComfyUI knows no other (190 MB)."""

from __future__ import annotations

from .tensors import linear, norm

WIDTH, FFN, LAYERS = 768, 3072, 12
CONV, CONV_KERNELS = 512, (10, 3, 3, 3, 3, 2, 2)
POSITION_KERNEL, POSITION_GROUPS = 128, 16


def shapes() -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor."""
    table: dict[str, tuple[int, ...]] = {"masked_spec_embed": (WIDTH,)}
    for index, kernel in enumerate(CONV_KERNELS):
        name = f"feature_extractor.conv_layers.{index}"
        table[f"{name}.conv.weight"] = (CONV, CONV if index else 1, kernel)
    position = "encoder.pos_conv_embed.conv"
    table |= {
        **norm("feature_extractor.conv_layers.0.layer_norm", CONV, bias=True),
        **norm("feature_projection.layer_norm", CONV, bias=True),
        **linear("feature_projection.projection", WIDTH, CONV),
        f"{position}.bias": (WIDTH,),
        f"{position}.parametrizations.weight.original0": (1, 1, POSITION_KERNEL),
        f"{position}.parametrizations.weight.original1": (WIDTH, WIDTH // POSITION_GROUPS, POSITION_KERNEL),
        **norm("encoder.layer_norm", WIDTH, bias=True),
    }
    for index in range(LAYERS):
        name = f"encoder.layers.{index}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            table |= linear(f"{name}.attention.{part}", WIDTH, WIDTH)
        table |= {
            **norm(f"{name}.layer_norm", WIDTH, bias=True),
            **linear(f"{name}.feed_forward.intermediate_dense", FFN, WIDTH),
            **linear(f"{name}.feed_forward.output_dense", WIDTH, FFN),
            **norm(f"{name}.final_layer_norm", WIDTH, bias=True),
        }
    return table
