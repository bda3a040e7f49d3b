"""Generating text token by token: sampling, key-value caches and the decoding step, without ComfyUI. Start at decoder.py."""
