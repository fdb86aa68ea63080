"""`dlopt judge`: whether a change is a gain."""
