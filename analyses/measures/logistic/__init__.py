"""Solvers of the multinomial logistic regression behind the probes."""
