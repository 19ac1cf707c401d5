"""Training a backbone, with LayerSync or without, on one process or several."""
