"""Lowbit: quantized loaders, attention and memory nodes for ComfyUI. Lists the nodes, nothing else."""


async def comfy_entrypoint():
    """ComfyUI's V3 entry point: returns the extension that lists this pack's nodes."""
    from .nodes import LowbitExtension

    return LowbitExtension()


WEB_DIRECTORY = "./web"
