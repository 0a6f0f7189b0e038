"""The engines that a worker can run: one module for each kind, all behind the port in base.py."""
