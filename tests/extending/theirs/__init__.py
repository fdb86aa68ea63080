"""A third-party package that extends dlopt: an optimizer, a model, a dataset and a recipe."""
