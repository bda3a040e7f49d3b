"""Drag-in nodes: schemas and a few lines each; the work is done by host, ops, attention and memory."""
