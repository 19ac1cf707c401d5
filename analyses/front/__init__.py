"""The front door: models and runs as notebooks and scripts use them, `import layerprobe as lp`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
