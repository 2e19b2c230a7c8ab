"""Measurements of trained weights: sharpness, curvature, landscapes, subspaces, in LoRA space and in full space."""
