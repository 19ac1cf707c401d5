"""Sentences made from the records of selections, verdicts and recommendations: the one place for their words."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
