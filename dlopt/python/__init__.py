"""The Python API: train, sweep, find_lr, runs and trained models, as from the shell."""
