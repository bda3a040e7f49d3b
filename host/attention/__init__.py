"""Attention in ComfyUI: start with override.py, which core calls for every attention; installing.py puts it on a model."""
