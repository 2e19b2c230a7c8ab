"""Subspaces of adapters: overlap of factors, and what lies outside LoRA-SAM's reach."""
