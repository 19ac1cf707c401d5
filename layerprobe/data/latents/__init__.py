"""Latents as people store them, and the autoencoder that makes them."""
