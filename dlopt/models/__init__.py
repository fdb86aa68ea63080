"""The models, one file per family. Each takes `input_shape` and `classes` from the data and returns [B, classes].

Models are (nested) `nn.Sequential`s wherever the data flow allows it, so that a model can be cut between any two
units, and their last layer is always called `head`.
"""
