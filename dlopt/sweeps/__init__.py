"""Many runs: grids and searches, where their processes run, and how several sweeps share one study."""
