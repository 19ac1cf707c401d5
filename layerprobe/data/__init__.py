"""Data sets as `Samples`: tensors in about [-1, 1], optional labels, and stable ids."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
