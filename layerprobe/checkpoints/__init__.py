"""Opening files, folders and names as backbones, without running code from them; saving and converting checkpoints."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
