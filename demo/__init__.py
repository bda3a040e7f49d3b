"""Scripts around the pack: tiny checkpoints of the real architectures, a headless ComfyUI, the demo itself."""
