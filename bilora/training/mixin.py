"""Runs any :class:`~bilora.methods.Method` inside any ``transformers.Trainer``."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bilora.errors import UserError
from bilora.methods import Method, Step, build_method
from bilora.training.saved import load_method, save_method
from bilora.training.window import MicroBatch, RngState, rng_preserved

if TYPE_CHECKING:

    class _Trainer(Trainer):
        """The Trainer the mixin will be put before."""

        optimizer: Any

else:
    _Trainer = object


class MethodMixin(_Trainer):
    """Put before a Trainer class: ``class MyTrainer(MethodMixin, Trainer)``.

    Gradient accumulation, clipping, mixed precision, checkpoints and ``accelerate launch`` work as in the Trainer.
    Primary and auxiliary gradients are clipped apart. During :meth:`train` the method may add parameters to the model;
    afterwards, and after an exception, the model is again an ordinary (PEFT) model.

    Args:
        method: a :class:`~bilora.methods.Method`, or the name of one to run with its defaults.

    Raises:
        UserError: the method and the model do not fit, or the run would use DeepSpeed, FSDP or ``nn.DataParallel``.
    """

    def __init__(self, *args: Any, method: Method | str = "lora", **kwargs: Any) -> None:
        self.method = build_method(method) if isinstance(method, str) else method
        super().__init__(*args, **kwargs)
        self._refuse_unsupported()
        self._by_examples = _averages_over_examples(self.model)
        if self._by_examples:
            # The Trainer would otherwise sum the micro-batches' mean losses instead of averaging them.
            self.model_accepts_loss_kwargs = False
        self._examples_in_window = 0
        self._share = 1.0
        self._prepared = False
        self._window: list[MicroBatch] = []
        self._last: MicroBatch | None = None
        self._resumes_from: str | None = None
        self._owns_optimizer = self.optimizer is None
        self.add_callback(_MethodCallback(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._window.clear()
            self._last = None
            self._prepared = False
            self.method.finish()

    @property
    def step(self) -> Step:
        """The optimizer step in progress."""
        return Step(self.state.global_step, self.state.max_steps, self.args.seed)

    # -- set-up ---------------------------------------------------------------------------------------------------

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        self.method.prepare(self.model, self.args.seed)
        self._prepared = True
        if resume_from_checkpoint is not None:
            self._load_method(resume_from_checkpoint)
        # A wrapper or an optimizer of an earlier train() would not know parameters that the method has just added.
        self.model_wrapped = self.model
        if self._owns_optimizer:
            self.optimizer = None
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As ``Trainer.create_optimizer``; parameters the method asks settings for stand in groups of their own."""
        groups = self.method.optimizer_groups()
        own = [p for parameters, _ in groups for p in parameters]
        if self.optimizer is not None or not own:
            return super().create_optimizer(model)
        with _frozen(own):
            optimizer = super().create_optimizer(model)
        for parameters, settings in groups:
            optimizer.add_param_group({"params": parameters, **settings})
        return optimizer

    # -- one optimizer step ---------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """As ``Trainer.get_batch_samples``."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._examples_in_window = sum(_examples(batch) for batch in batches)
        return batches, items

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.compute_loss``; a training micro-batch counts by its share of the window's examples."""
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if self._share == 1.0:
            return result
        return (result[0] * self._share, result[1]) if isinstance(result, tuple) else result * self._share

    @contextlib.contextmanager
    def _weighted(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Weight the loss so that the Trainer's mean over micro-batches becomes the mean over examples."""
        if self._by_examples and self._examples_in_window:
            self._share = _examples(inputs) * self.current_gradient_accumulation_steps / self._examples_in_window
        try:
            yield
        finally:
            self._share = 1.0

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As ``Trainer.training_step``, at the weights the method puts in force."""
        if not self._prepared:
            # A method that was never bound to the model would silently be plain training.
            raise RuntimeError("the Trainer did not prepare the method: this version of transformers is not supported")
        self._last = MicroBatch(dict(inputs), num_items_in_batch, RngState.now())
        if self.method.replays:
            self._window.append(self._last)
        with self.method.perturbed(self.step), self._weighted(inputs):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise UserError(
                f"the training loss became {float(loss)} at step {self.state.global_step}: "
                "lower learning_rate or the perturbation radius, or check the data"
            )
        if self.accelerator.sync_gradients:
            if self.method.replays:
                self.method.extra_passes(self.step, lambda: self._replay(model))
                self._window.clear()
            if self._logs_after_this_step():
                self.method.probe(lambda: self._loss_again(model))
        return loss

    def _replay(self, model: nn.Module) -> None:
        """Run the window again from cleared gradients, reducing over processes at its last micro-batch only."""
        model.zero_grad()
        with rng_preserved():
            for i, micro in enumerate(self._window):
                micro.rng.restore()
                last = i == len(self._window) - 1
                synchronising = contextlib.nullcontext() if last else self.accelerator.no_sync(model=model)
                with synchronising, self._weighted(micro.inputs):
                    super().training_step(model, dict(micro.inputs), micro.items)

    def _loss_again(self, model: nn.Module) -> float:
        """Loss of the last micro-batch without gradient, under the same dropout masks."""
        assert self._last is not None
        plain = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        with rng_preserved(), torch.no_grad(), self.compute_loss_context_manager():
            self._last.rng.restore()
            inputs = self._prepare_inputs(dict(self._last.inputs))
            return float(self.compute_loss(plain, inputs, num_items_in_batch=self._last.items))

    def _logs_after_this_step(self) -> bool:
        step = self.state.global_step + 1
        if self.args.logging_strategy != "steps":
            return False
        return step % max(1, int(self.state.logging_steps)) == 0 or (step == 1 and self.args.logging_first_step)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        groups = self.method.clip_groups()
        apart = {p for group in groups for p in group}
        if not apart:
            return super()._clip_grad_norm(model)
        # accelerate unscales every gradient of the optimizer in its first call and refuses a second one under fp16.
        rest = [p for p in model.parameters() if p.requires_grad and p not in apart]
        norm = self.accelerator.clip_grad_norm_(rest, self.args.max_grad_norm)
        for group in groups:
            torch.nn.utils.clip_grad_norm_(group, self.args.max_grad_norm)
        return norm

    # -- logs and checkpoints -------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As ``Trainer.log``, with the method's metrics beside the training loss."""
        if "loss" in logs:
            logs = {**logs, **self.method.metrics()}
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:  # every process comes here, one writes
            return
        save_method(self.method, output_dir if output_dir is not None else self.args.output_dir)

    def _load_method(self, checkpoint: str) -> None:
        saved = load_method(checkpoint)
        if saved is None or saved.name != self.method.name:
            found = "no method" if saved is None else f"method {saved.name!r}"
            raise UserError(
                f"{checkpoint} holds {found}, this run is {self.method.name!r}: resume with the same method"
            )
        self.method.load_state_dict(saved.tensors)

    # -- what cannot work -----------------------------------------------------------------------------------------

    def _refuse_unsupported(self) -> None:
        if self.is_deepspeed_enabled:
            raise UserError(
                "DeepSpeed updates the weights inside backward(), where no method can act: launch with DDP instead"
            )
        if self.is_fsdp_enabled:
            raise UserError(
                "under FSDP the norms of perturbations would be those of one shard: launch with DDP instead"
            )
        if self.args.n_gpu > 1:
            raise UserError(
                "nn.DataParallel copies the model to each GPU and would share one auxiliary: "
                "start with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one GPU"
            )
        if self.method.needs_lora and not isinstance(self.model, PeftModel):
            raise UserError(
                f"{self.method.name} trains a LoRA adapter and {type(self.model).__name__} has none: "
                "wrap it with peft.get_peft_model(model, LoraConfig(...))"
            )
        if not self.method.needs_lora and isinstance(self.model, PeftModel):
            raise UserError(f"{self.method.name} trains every weight: give it the plain model, not a PeftModel")


class _MethodCallback(TrainerCallback):
    """Calls the method around the optimizer's update."""

    def __init__(self, trainer: MethodMixin) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.method.before_update(self.trainer.step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer.method.after_update(self.trainer.step)


@contextlib.contextmanager
def _frozen(parameters: list[nn.Parameter]) -> Any:
    """Hide parameters from the Trainer's own grouping, which takes all that require a gradient."""
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def _examples(inputs: dict[str, Any]) -> int:
    """Number of examples in a batch."""
    return len(inputs["labels"]) if "labels" in inputs else 0


def _averages_over_examples(model: nn.Module) -> bool:
    """Whether the model's loss is a mean over examples, so that a count of items does not apply to it."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(base, "loss_type", None) in ("ForSequenceClassification", "ForImageClassification")
