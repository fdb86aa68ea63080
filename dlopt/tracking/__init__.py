"""Output of a run: the console, metrics.jsonl, summary.json, train.log, TensorBoard, MLflow and Weights & Biases."""

from dlopt.tracking.metrics import read_metrics, read_summary
from dlopt.tracking.tracking import Tracking

__all__ = ["Tracking", "read_metrics", "read_summary"]
