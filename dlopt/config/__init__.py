"""From the command line to a checked experiment: composes configs, checks signatures and combinations."""
