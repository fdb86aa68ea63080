"""What several commands share: command lines, usage, processes."""
