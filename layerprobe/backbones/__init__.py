"""Backbones: one adapter per model family, all with the same noise levels and velocity convention."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
