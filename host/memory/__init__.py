"""The memory manager in ComfyUI: start with manager.py, which puts it on a model, a text encoder and a VAE."""
