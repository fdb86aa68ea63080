"""Parallelism: one file per mode. Only this package calls torch.distributed."""
