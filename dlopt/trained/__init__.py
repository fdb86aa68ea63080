"""Use of trained models: restore, ensembles, labels, continued texts, export."""
