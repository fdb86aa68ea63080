"""Analysis and plots of runs, models and optimizers."""
