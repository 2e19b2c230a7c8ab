"""Trainers that run a method, and what they save."""

from bilora.training.mixin import MethodMixin
from bilora.training.recorder import Recorder
from bilora.training.recording import Moment, Recording, read_recording
from bilora.training.saved import SavedMethod, load_method, save_method
from bilora.training.trainer import BiLoraTrainer

__all__ = [
    "BiLoraTrainer",
    "MethodMixin",
    "Moment",
    "Recorder",
    "Recording",
    "SavedMethod",
    "load_method",
    "read_recording",
    "save_method",
]
