"""What a model and its gradients look like, layer by layer, and what is wrong with them."""
