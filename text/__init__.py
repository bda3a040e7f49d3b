"""Writing text token by token, without ComfyUI: sampling, key-value caches and the decoding step. Start with decoder.py."""
