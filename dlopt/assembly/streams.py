"""What the seeds of an experiment are for."""

# Streams: what is drawn for one purpose tells nothing about another, also where the seeds are equal.
WEIGHTS, SCHEME, ORDER, AUGMENTATION, DROPOUT = range(11, 16)
