"""The models, one file per family. Each takes `input_shape` and `classes` from the data and returns [B, classes].

Models are (nested) `nn.Sequential`s wherever the data flow allows it, so that they can be split into pipeline stages
between any two modules. Their last layer is always called `head`.
"""
