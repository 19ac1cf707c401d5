"""All figures of analyses. No other room imports matplotlib or seaborn."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
