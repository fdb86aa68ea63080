"""Benchmarks and cost models of devices, layers and parallel modes."""
