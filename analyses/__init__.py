"""Analyses of features: measures, tables, selection, experiments, figures, reports, and the jobs over a run folder."""
