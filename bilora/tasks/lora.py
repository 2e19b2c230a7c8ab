"""Wrapping a base model with a plain PEFT LoRA adapter."""

from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from bilora.errors import UserError
from bilora.tasks.models import seeded
from bilora.tasks.spec import TaskKind

TASK_TYPES = {"classification": TaskType.SEQ_CLS, "causal_lm": TaskType.CAUSAL_LM}


class LoraSpec(BaseModel):
    """Settings of the adapter, named as in ``peft.LoraConfig``. The defaults are those of the Bi-LoRA paper.

    Attributes:
        r: rank.
        lora_alpha: the update is scaled by ``lora_alpha / r``.
        lora_dropout: dropout on the adapter's input while training.
        target_modules: ``all-linear`` (every linear layer but the output head), names of layers, or a regular
            expression.
        use_rslora: scale by ``lora_alpha / √r`` instead.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    r: PositiveInt = 8
    lora_alpha: PositiveFloat = 16
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False


def add_lora(model: Any, spec: LoraSpec, kind: TaskKind, seed: int) -> PeftModel:
    """Wrap ``model`` with a LoRA adapter whose factors are drawn from ``seed`` alone. ``model`` itself is changed.

    Raises:
        UserError: ``target_modules`` names no layer of the model.
    """
    targets = spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules)
    config = LoraConfig(
        task_type=TASK_TYPES[kind],
        r=spec.r,
        lora_alpha=spec.lora_alpha,
        lora_dropout=spec.lora_dropout,
        target_modules=targets,
        use_rslora=spec.use_rslora,
    )
    try:
        with seeded(seed, "lora factors"):
            return get_peft_model(model, config)
    except ValueError as error:
        detail = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UserError(f"target_modules {targets} does not fit the model: {detail}") from error
