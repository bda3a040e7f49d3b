"""Trains the demo's small text-to-video model: a Wan VAE, a UMT5 and a Wan transformer, on drawn moving shapes."""
