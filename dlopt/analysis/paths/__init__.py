"""Optimizers on functions of two variables."""
