"""Stored latents in common formats, and the autoencoder that encodes and decodes them."""
