"""Laboratory: benchmarks, comparisons and measurements on top of the runner."""
