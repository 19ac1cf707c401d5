"""Measure what each layer of a diffusion model knows, pick which layer should teach which, and prove it by training."""

__version__ = "0.1.0"
