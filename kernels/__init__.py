"""Triton kernels, one idea a file, each with its plain-torch reference beside it. Imports no comfy."""
