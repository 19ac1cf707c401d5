"""One axis of noise for all families: schedules, predictions and keyed random numbers."""
