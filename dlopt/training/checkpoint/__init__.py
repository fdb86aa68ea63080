"""Checkpoints: files, shards, and weights of others."""
