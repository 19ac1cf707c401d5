"""A run folder and the jobs over it, which the command line and library users call."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
