"""Text generation in ComfyUI, decoding behind clip.generate: start with route.py."""
