"""Attention backends, the dispatcher that picks one per shape, and its timing cache. Imports no comfy."""
