"""Tasks of tests that do not load a dataset."""

from dlopt.data.task import Task

CLASSIFICATION = Task("classification", 10)
REGRESSION = Task("regression", 1)
