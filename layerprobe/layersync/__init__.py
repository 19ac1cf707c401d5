"""LayerSync, the regularizer that aligns a layer of a network to a later one."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
