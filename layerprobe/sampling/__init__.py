"""Sampling from a backbone: the plan, and the solvers of the probability-flow ODE and of SDEs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
