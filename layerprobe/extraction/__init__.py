"""Features of layers at noise levels, from a backbone to a store on disk."""
