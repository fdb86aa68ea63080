"""A package of somebody else's that extends dlopt: an optimizer, a model, a data set and a recipe."""
