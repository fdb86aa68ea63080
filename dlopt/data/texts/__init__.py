"""Texts as tokens, and the windows of them that a model reads."""
