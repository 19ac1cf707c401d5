"""From a file, a folder or a name to a backbone, without running code from it; saving and converting."""
