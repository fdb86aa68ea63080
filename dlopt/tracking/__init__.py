"""Output of a run: the console, metrics.jsonl, summary.json, train.log, TensorBoard, MLflow and Weights & Biases."""
