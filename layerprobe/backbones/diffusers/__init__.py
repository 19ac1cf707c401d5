"""Opens models of the diffusers library as backbones."""
