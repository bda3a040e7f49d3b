"""What this folder takes from ComfyUI: without one of NEEDED the loaders are left out, without the others one thing is."""

from __future__ import annotations

from ...versions import dotted

NEEDED = dotted(
    {
        "comfy.model_management": (
            "cast_to_device free_memory get_torch_device load_models_gpu throw_exception_if_processing_interrupted "
            "unet_manual_cast unet_offload_device unload_model_and_clones"
        ),
        "comfy.model_patcher": "CoreModelPatcher ModelPatcher",
        "comfy.ops": "CastBiasWeightContext mixed_precision_ops",
        "comfy.patcher_extension": "CallbacksMP",
        "comfy.patcher_extension.WrappersMP": "APPLY_MODEL CALC_COND_BATCH OUTER_SAMPLE",
        "comfy.quant_ops": "QuantizedTensor",
        "comfy.sd": "CLIP CLIPType VAE load_diffusion_model_state_dict load_text_encoder_state_dicts",
        "comfy.utils": "ProgressBar get_attr load_torch_file set_attr set_attr_param",
        "comfy_execution.graph": "ExecutionBlocker",
        "comfy_kitchen.tensor.base": "LAYOUTS",
        "folder_paths": (
            "filename_list_cache folder_names_and_paths get_filename_list get_filename_list_ get_folder_paths "
            "get_full_path get_output_directory get_save_image_path models_dir"
        ),
        "nodes": "VAELoader",
    }
)

PATCHING = dotted(
    {
        "comfy.model_patcher.ModelPatcher": (
            "add_hook_patches clone get_combined_hook_patches load model_state_dict model_state_dict_for_saving partially_load "
            "partially_unload patch_cached_hook_weights patch_hook_weight_to_device patch_hooks unpatch_hooks unpatch_model"
        ),
        "comfy.model_patcher": "LazyCastingParamPiece LazyCastingQuantizedParam",
        "comfy.weight_adapter.lora": "LoRAAdapter",
    }
)
"""Without one of these LoRAs go into the weights: half of the others would apply them twice."""

_MLP = "the MLPs of Wan and of some text encoders multiply 8-bit weights as ComfyUI does"
_ROWS = "modulation, norms and rotary embeddings run in ComfyUI's kernels, a little slower"
_DETECTION = "a file of a kind that ComfyUI does not know is noticed only when it is loaded"
_HEAD = "Qwen2.5-VL is loaded without its output head, so it cannot write text"
OPTIONAL = {
    **dict.fromkeys(PATCHING, "LoRAs on quantized models are quantized with the weights, as ComfyUI does it"),
    "comfy.model_management.archive_model_dtypes": _HEAD,
    "comfy.sd1_clip.SDClipModel": _HEAD,
    "comfy.text_encoders.llama.Qwen25_7BVLI": _HEAD,
    **dict.fromkeys(
        dotted({"comfy_aimdo.model_vbar": "vbar_fault vbar_signature_compare vbar_unpin"}),
        "dynamic VRAM is asked for weights that are on the GPU already, a little slower",
    ),
    "comfy.conds.CONDConstant": "conditions that ComfyUI compares are read from the GPU at every step",
    **dict.fromkeys(
        (
            "comfy.ldm.flux.layers.apply_mod",
            "comfy.ldm.flux.math.apply_rope",
            "comfy.ldm.flux.math.apply_rope1",
            "comfy.ldm.qwen_image.model.Attention",
            "comfy.ldm.qwen_image.model.QwenImageTransformerBlock",
            "comfy.ldm.wan.model.repeat_e",
            "comfy.ops.disable_weight_init.LayerNorm",
            "comfy.ops.disable_weight_init.RMSNorm",
        ),
        _ROWS,
    ),
    "comfy.memory_management.aimdo_enabled": "a load that main memory cannot hold is not refused beforehand",
    "comfy.ldm.qwen_image.model.FeedForward": "Qwen-Image's MLPs run without their fused activation, a little slower",
    "comfy.ops.linear_input_act": _MLP,
    "comfy.ops.INPUT_ACT_EAGER": _MLP,
    "comfy.ops.run_every_op": "a run can be interrupted between its steps only",
    "comfy.quant_ops.QUANT_ALGOS": "a format that ComfyUI does not have is noticed only when it is loaded",
    "comfy.sd.detect_te_model": _DETECTION,
    "comfy.model_detection.convert_diffusers_mmdit": _DETECTION,
    "comfy.model_detection.model_config_from_diffusers_unet": _DETECTION,
    "comfy.model_detection.model_config_from_unet": _DETECTION,
    "comfy.supported_models_base.BASE": "how a checkpoint of SDXL samples is not carried on where it is quantized once loaded",
    "comfy.utils.clip_text_transformers_convert": "layers that ComfyUI takes apart are kept in 16 bits by their names alone",
    "comfy.utils.unet_to_diffusers": "files of Stable Diffusion in diffusers' names are refused",
    "comfy_extras.nodes_model_patch.MultiTalkModelPatch": "InfiniteTalk and MultiTalk patches cannot be loaded",
    "comfy_extras.nodes_model_patch.ModelPatchLoader": "model patches other than InfiniteTalk's cannot be loaded",
}
"""Name -> what is lost without it."""
