"""What this folder takes from ComfyUI: without one of NEEDED the text generation node is left out, without the others a family is."""

from __future__ import annotations

from ...versions import dotted

NEEDED = dotted(
    {
        "comfy.model_management": "should_use_bf16 throw_exception_if_processing_interrupted",
        "comfy.ops": "cast_bias_weight uncast_bias_weight",
        "comfy.sd": "CLIP",
        "comfy.sd.CLIP": "generate tokenize",
        "comfy.sd1_clip": "SDClipModel",
        "comfy.text_encoders.llama": "BaseGenerate Llama2_ Qwen25_7BVLI",
        "comfy.text_encoders.llama.BaseGenerate": "generate",
        "comfy.text_encoders.qwen_vl": "qwen2vl_mrope_position_ids",
        "comfy.utils": "ProgressBar",
    }
)
_GEMMA4 = "Gemma 4 writes through ComfyUI's own loop"
OPTIONAL = {
    "comfy.text_encoders.gemma4.Gemma4Transformer": _GEMMA4,
    "comfy.text_encoders.gemma4.RingKV": _GEMMA4,
    "comfy.text_encoders.qwen35.Qwen35Transformer": "Qwen3.5 writes through ComfyUI's own loop",
}
"""Name -> what is lost without it."""
