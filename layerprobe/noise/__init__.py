"""Noise schedules on one common axis, prediction targets and conversions, and keyed random numbers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
