"""One axis of noise for all families: schedules, predictions and keyed random numbers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
