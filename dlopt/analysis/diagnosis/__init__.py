"""Diagnosis of activations and gradients, layer by layer."""
