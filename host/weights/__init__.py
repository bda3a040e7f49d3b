"""Quantized weights in ComfyUI: start with loading.py; operations.py multiplies, preparing.py quantizes."""
