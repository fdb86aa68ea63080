"""What a run shows and leaves behind: the console, metrics.jsonl and summary.json, TensorBoard, train.log."""

from dlopt.tracking.metrics import read_metrics, read_summary
from dlopt.tracking.tracking import Tracking

__all__ = ["Tracking", "read_metrics", "read_summary"]
