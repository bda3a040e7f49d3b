"""What this folder takes from ComfyUI: without one of NEEDED the memory nodes are left out, without the others one thing is."""

from __future__ import annotations

from ...versions import dotted

NEEDED = dotted(
    {
        "comfy.memory_management": "aimdo_enabled",
        "comfy.model_base": "BaseModel",
        "comfy.model_management": (
            "EXTRA_RESERVED_VRAM TOTAL_PINNED_MEMORY current_loaded_models get_free_memory get_torch_device "
            "get_total_memory raise_non_oom soft_empty_cache"
        ),
        "comfy.patcher_extension": "CallbacksMP WrappersMP",
        "comfy.patcher_extension.CallbacksMP": "ON_LOAD",
        "comfy.patcher_extension.WrappersMP": (
            "CALC_COND_BATCH DIFFUSION_MODEL OUTER_SAMPLE PREPARE_SAMPLING SAMPLER_SAMPLE"
        ),
        "comfy.sampler_helpers": "estimate_memory get_additional_models",
        "comfy_aimdo.control": "lib",
        "comfy_aimdo.model_vbar": "vbar_unpin",
        "comfy_execution.progress": "ProgressHandler add_progress_handler",
        "comfy_execution.utils": "get_executing_context",
    }
)

_FETCHING = "streamed weights are fetched a layer ahead, by ComfyUI itself, and not a block"
FETCHING = dotted(
    {
        "comfy.model_management": "STREAMS get_offload_stream stream_counters",
        "comfy.model_prefetch": "cleanup_prefetch_queues make_prefetch_queue prefetch_queue_pop",
    }
)
"""What fetching blocks ahead takes; it is off without one of them."""

_METER = "the live meter is not shown"
OPTIONAL = {
    **dict.fromkeys(FETCHING, _FETCHING),
    "comfy.ldm.wan.model.WanModel": f"in Wan models {_FETCHING}",
    "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel": f"in Qwen-Image models {_FETCHING}",
    **dict.fromkeys(
        (
            "comfy.audio_encoders",
            "comfy.controlnet",
            "comfy.sd1_clip",
            "comfy.sdxl_clip",
            "comfy.taesd",
            "comfy.text_encoders",
            "comfy_extras.nodes_model_patch",
        ),
        "models of one kind are counted as another in the memory report",
    ),
    **dict.fromkeys(
        (
            "comfy_execution.cache_provider.register_cache_provider",
            "comfy_execution.cache_provider.unregister_cache_provider",
        ),
        "a VRAM limit ends when the next prompt begins, and not with its own",
    ),
    "comfy.model_management.STREAM_AIMDO_CAST_BUFFERS": "cast buffers of dynamic VRAM are not in the report",
    "server.PromptServer": _METER,
    "server.PromptServer.send_sync": _METER,
    "server.PromptServer.send_progress_text": _METER,
}
"""Name -> what is lost without it."""
