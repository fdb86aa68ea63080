"""`dlopt ladder`: the gain of an optimizer as a function of the size of the model."""
