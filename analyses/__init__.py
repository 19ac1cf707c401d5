"""The questions asked of a feature store: numbers in, tables out, no model in sight."""
