"""Ways to make an instance ready, one file each: the worker takes the fastest that applies."""
