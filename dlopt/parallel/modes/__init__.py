"""The parallel modes, one file each, and what several of them share."""
