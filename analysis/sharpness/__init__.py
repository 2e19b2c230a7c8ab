"""Loss under perturbed weights: random directions and the gradient's."""
