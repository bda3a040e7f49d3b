"""Lowbit: quantized loaders, attention and memory nodes for ComfyUI. Lists the nodes, nothing else."""


async def comfy_entrypoint():
    """ComfyUI's V3 entry point: returns the extension that lists this pack's nodes."""
    try:
        from .nodes import LowbitExtension
    except ImportError as error:
        from .versions import lacking

        raise ImportError(lacking([str(error)], "no node can be listed")) from error
    return LowbitExtension()


WEB_DIRECTORY = "./web"
