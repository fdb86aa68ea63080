"""The parallel modes, one file each, and their shared code."""
