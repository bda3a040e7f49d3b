"""One sample over several GPUs: workers with a copy of the model, each with its part of the tokens."""
