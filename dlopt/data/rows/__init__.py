"""Rows with an input and a label, read one at a time: of Arrow tables, tar shards and datasets of the user."""
