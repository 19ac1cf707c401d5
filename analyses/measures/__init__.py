"""Measures of representations, as pure functions of arrays: probes, neighbors, similarities and spectra.

This room imports nothing else of layerprobe.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
