"""Measuring and calculating what devices, layers and modes of parallelism cost."""
