"""A few small runs set beside each other."""
