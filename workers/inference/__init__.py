"""The inference worker: runs engines on one host, proves them, and stops them when nobody uses them."""
