"""A run folder and the jobs over it, which the command line and library users call."""
