"""Trains every LoRA method and writes its weights; started by ``accelerate launch`` with 1 and with 2 processes."""

import sys
from pathlib import Path

from accelerate import PartialState
from safetensors.torch import save_file
from transformers import TrainingArguments

from bilora import METHODS, BiLoraTrainer, build_method
from bilora.training import Recorder
from tests.training.tiny import factors, pad, ragged_data, tiny_bert, with_lora


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    for name, method in METHODS.items():
        model = with_lora(tiny_bert()) if method.needs_lora else tiny_bert()
        arguments = TrainingArguments(
            str(folder / "trainer"),
            max_steps=3,
            per_device_train_batch_size=4 // state.num_processes,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        recorder = Recorder(folder / f"{name}-{state.num_processes}", every=1, losses_every=1)
        trainer = BiLoraTrainer(
            model=model,
            method=build_method(name),
            args=arguments,
            train_dataset=ragged_data(),
            data_collator=pad,
            callbacks=[recorder] if method.needs_lora else None,
        )
        trainer.train()
        if state.is_main_process:
            method_state = {k: v.contiguous() for k, v in trainer.method.state_dict().items()}
            save_file({**factors(model), **method_state}, folder / f"{name}-{state.num_processes}.safetensors")
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
