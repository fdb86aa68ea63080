"""Builders of what a run trains with: workload, batches, optimizer, precision, recomputation, muP."""
