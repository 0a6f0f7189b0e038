"""Processes and adapters: everything that touches the world."""
