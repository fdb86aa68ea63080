"""Instruments of a run: diagnostics, profiler, learning-rate range test, model summary, reconstructions."""
