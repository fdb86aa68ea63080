"""Tasks of tests that do not load a dataset."""

from dlopt.tasks.classification import Classification
from dlopt.tasks.regression import Regression

CLASSIFICATION = Classification(10)
REGRESSION = Regression(1)
