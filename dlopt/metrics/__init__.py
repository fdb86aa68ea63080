"""Metrics of an evaluation: accumulators, and the names and directions of metrics."""
