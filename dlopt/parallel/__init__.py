"""Parallelism: one file per mode; nothing else in the project calls torch.distributed."""
