"""Models of the diffusers library as backbones."""
