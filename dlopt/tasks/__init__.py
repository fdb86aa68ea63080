"""Tasks: one file each, which defines inputs and predictions of the model, loss, metrics and test."""
