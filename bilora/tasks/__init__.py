"""Tasks: text, labels and base models, from files, built-ins or the hub, made ready for training and measuring."""

from bilora.tasks.fingerprint import base_fingerprint
from bilora.tasks.lora import LoraSpec, add_lora
from bilora.tasks.models import BUILT_IN_MODELS, ModelSpec, load_model, load_tokenizer, resolve_model
from bilora.tasks.spec import TaskKind, TaskSpec
from bilora.tasks.task import Task, load_task

__all__ = [
    "BUILT_IN_MODELS",
    "LoraSpec",
    "ModelSpec",
    "Task",
    "TaskKind",
    "TaskSpec",
    "add_lora",
    "base_fingerprint",
    "load_model",
    "load_task",
    "load_tokenizer",
    "resolve_model",
]
