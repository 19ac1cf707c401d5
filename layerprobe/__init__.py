"""Measure what each layer of a diffusion model knows, pick which layer should teach which, and prove it by training.

import layerprobe as lp

model = lp.open("digits")
run = lp.probe(model, "digits")
run.best_layers(), run.pick, run.plot("probe accuracy")
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
