"""From a file, a folder or a name to a backbone, without running code from it; saving and converting."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
