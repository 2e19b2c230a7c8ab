"""The ``train`` fixture: a short real Trainer run."""

import pytest
from transformers import TrainingArguments

from bilora import BiLoraTrainer
from tests.training.tiny import pad, ragged_data


@pytest.fixture
def train(tmp_path):
    """``train(model, method, data, **arguments)`` → the trainer after training, plain SGD by default."""

    def run(model, method, data=None, resume=None, folder="out", callbacks=None, trainer=BiLoraTrainer, **arguments):
        defaults = {
            "max_steps": 3,
            "per_device_train_batch_size": 8,
            "learning_rate": 0.1,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "logging_steps": 1,
            "dataloader_pin_memory": False,
        }
        made = trainer(
            model=model,
            method=method,
            args=TrainingArguments(str(tmp_path / folder), **{**defaults, **arguments}),
            train_dataset=ragged_data() if data is None else data,
            data_collator=pad,
            callbacks=callbacks,
        )
        made.train(resume_from_checkpoint=resume)
        return made

    return run
