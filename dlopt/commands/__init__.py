"""What each sub-command does with its arguments."""
