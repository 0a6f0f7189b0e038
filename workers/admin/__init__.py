"""The management API: HTTP on a port of its own, thin over the same commands and views as the command line."""
