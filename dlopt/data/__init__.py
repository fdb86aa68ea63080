"""Datasets, splits, input normalization, samplers and batches (in memory or streamed)."""
