"""From evidence to a ranked list of layer pairs."""
