"""Building what a run works with, from its experiment: data and model, batches, optimizer, the training itself."""
