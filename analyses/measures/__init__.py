"""Pure mathematics on arrays: probes, neighbors, similarities and spectra. Imports nothing else of layerprobe."""
