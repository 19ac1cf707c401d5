"""Backbones: one adapter per model family, all speaking the same noise axis and velocity convention."""
