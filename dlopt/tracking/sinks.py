"""What a run can send its metrics to. Imports nothing, because the keys of a run are checked without the services."""

from typing import Literal

Sink = Literal["tensorboard", "mlflow", "wandb"]
