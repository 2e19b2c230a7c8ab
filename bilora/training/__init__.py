"""Trainers that run a method, and what they save."""

from bilora.training.mixin import MethodMixin
from bilora.training.saved import SavedMethod, load_method, save_method
from bilora.training.trainer import BiLoraTrainer

__all__ = ["BiLoraTrainer", "MethodMixin", "SavedMethod", "load_method", "save_method"]
