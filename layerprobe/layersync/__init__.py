"""The regularizer that lets a layer of a network learn from a later one."""
