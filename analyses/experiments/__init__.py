"""Paired training runs: arms, power, evaluation, verdict and the sweep over all pairs."""
