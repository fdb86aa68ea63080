"""What is learned: one file per task, which says what the model reads and predicts, its loss, metrics and test."""
