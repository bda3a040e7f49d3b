"""Decoding behind core's clip.generate. Start at route.py."""
