"""Audio, motion and video."""
