"""The trainer: builds a run, trains, evaluates, saves checkpoints, tests and summarizes."""
