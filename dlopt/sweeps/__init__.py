"""Sweeps: grids and searches, the worker pools that run their jobs, and studies that several sweeps share."""
