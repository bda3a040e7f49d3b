"""The test rig: a headless ComfyUI, graphs, tiny checkpoints of real architectures, and shims for tests. Not installed."""
