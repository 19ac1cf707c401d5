"""Paired training runs: arms, power, evaluation, verdict and the sweep over all pairs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
