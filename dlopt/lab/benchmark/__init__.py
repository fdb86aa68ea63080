"""`dlopt benchmark`: compares tuned optimizers over several workloads by their time to a target."""
