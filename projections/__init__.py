"""Read models: pure folds of the log that never reject an event."""
