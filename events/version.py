"""The version that stands in every header and in the package. Knows nothing else."""

VERSION = "0.1.0"
