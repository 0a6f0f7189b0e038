"""Facts: what happened, and how it is kept. Knows nothing of decisions, views or processes."""
