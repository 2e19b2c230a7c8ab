"""Loss along directions through the trained weights."""
