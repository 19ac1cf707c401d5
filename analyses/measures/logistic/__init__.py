"""Multinomial logistic regression of the probes: the fits, and the solvers that certify their optimum."""
