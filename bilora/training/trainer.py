"""The ready-made Trainer."""

from transformers import Trainer

from bilora.training.mixin import MethodMixin


class BiLoraTrainer(MethodMixin, Trainer):
    """``transformers.Trainer`` that trains with any :class:`~bilora.methods.Method`.

    >>> trainer = BiLoraTrainer(model=peft_model, method=BiLora(rho=0.05), args=arguments, train_dataset=data)
    """
