"""Parallel scaling: benchmarks and cost models of devices, layers and parallel modes."""
