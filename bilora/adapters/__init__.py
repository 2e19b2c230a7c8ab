"""Adapted layers, auxiliary pairs and weights that change only for a while."""
