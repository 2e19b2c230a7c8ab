"""Runs any :class:`~bilora.methods.Method` inside any ``transformers.Trainer``."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bilora.adapters.norms import norms_of
from bilora.errors import UserError
from bilora.methods import Method, Step, build_method
from bilora.methods.checks import check_positive
from bilora.training.guard import FiniteGuard
from bilora.training.loraplus import loraplus_groups
from bilora.training.recorder import Recorder
from bilora.training.replay import Replay
from bilora.training.saved import load_method, save_method
from bilora.training.window import MicroBatch, RngState, examples_in, labels_of, losses_by_example, rng_preserved

if TYPE_CHECKING:

    class _Trainer(Trainer):
        """The Trainer the mixin will be put before."""

        optimizer: Any

else:
    _Trainer = object


STEPS = "steps"
"""Key of the step counters in a checkpoint's metadata."""


class MethodMixin(_Trainer):
    """Put before a Trainer class: ``class MyTrainer(MethodMixin, Trainer)``.

    Gradient accumulation, clipping, mixed precision, checkpoints and ``accelerate launch`` work as in the Trainer.
    Primary and auxiliary gradients are clipped apart. During :meth:`train` the method may add parameters to the model;
    afterwards, and after an exception, the model is again an ordinary (PEFT) model.

    Args:
        method: a :class:`~bilora.methods.Method`, or the name of one to run with its defaults.
        max_skipped_steps: a step whose loss or gradient is not finite updates nothing; so many in a row end the
            training.
        loraplus_lr_ratio: LoRA+: the factors B learn at this multiple of the learning rate
            (:mod:`bilora.training.loraplus`); a method's own parameters, such as Bi-LoRA's auxiliary, do not. None:
            they learn like the rest.

    Raises:
        UserError: the method and the model do not fit, ``loraplus_lr_ratio`` comes with an optimizer made outside, or
            the run would use DeepSpeed, FSDP or ``nn.DataParallel``.
    """

    def __init__(
        self,
        *args: Any,
        method: Method | str = "lora",
        max_skipped_steps: int = 3,
        loraplus_lr_ratio: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.method = build_method(method) if isinstance(method, str) else method
        self._guard = FiniteGuard(max_skipped_steps)
        if loraplus_lr_ratio is not None:
            check_positive("LoRA+", "loraplus_lr_ratio", loraplus_lr_ratio)
        self._loraplus_lr_ratio = loraplus_lr_ratio
        super().__init__(*args, **kwargs)
        self._refuse_unsupported()
        # A loss function of the user's is given the window's number of items and normalises by it.
        self._by_examples = _averages_over_examples(self.model) and self.compute_loss_func is None
        if self._by_examples:
            # The Trainer would otherwise sum the micro-batches' mean losses instead of averaging them.
            self.model_accepts_loss_kwargs = False
        self._examples_in_window = 0
        self._share = 1.0
        self._prepared = False
        self._recorders: list[Recorder] = []
        self._window: list[MicroBatch] = []
        self._forget_window()
        self._owns_optimizer = self.optimizer is None
        if loraplus_lr_ratio is not None and not self._owns_optimizer:
            raise UserError("loraplus_lr_ratio needs the Trainer's own optimizer: leave out `optimizers` or the ratio")
        self.add_callback(_MethodCallback(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``.

        Raises:
            UserError: too many steps in a row had no finite loss and gradient.
        """
        self._guard.start()
        self._recorders = self._recorders_given()
        for recorder in self._recorders:
            recorder.watch(self.model, self.method)
        try:
            outcome = super().train(*args, **kwargs)
            if self._guard.skipped and not self._guard.applied:
                raise UserError("no step had a finite loss and gradient: lower learning_rate, or check the data")
            return outcome
        finally:
            self._forget_window()
            self._prepared = False
            self.method.finish()

    def _recorders_given(self) -> list[Recorder]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, Recorder)]

    def _forget_window(self) -> None:
        self._window.clear()
        self._micro_index = 0
        self._last: MicroBatch | None = None
        self._keeps_losses = False
        self._ended: Step | None = None
        self._guard.forget_window()

    @property
    def skipped_steps(self) -> int:
        """Steps of the last training that updated nothing because the loss or the gradient was not finite."""
        return self._guard.skipped

    @property
    def updating(self) -> Step | None:
        """The step whose update is about to happen or has just happened; None if it has none, being not finite."""
        return self._ended

    def _step(self, *, ended: bool = False) -> Step:
        """The optimizer step in progress; with its window ``ended``, what its update goes by."""
        scaler = self._scaler if ended else None
        groups = self.optimizer.param_groups if ended else []
        return Step(
            index=self.state.global_step,
            total=self.state.max_steps,
            seed=self.args.seed,
            offset=(self._micro_index * self.args.world_size + self.args.process_index) * self._train_batch_size,
            rates={p: group["lr"] for group in groups for p in group["params"]},
            loss_scale=1.0 if scaler is None else scaler.get_scale(),
        )

    @property
    def _scaler(self) -> Any:
        """fp16's gradient scaler, or None."""
        return getattr(self.accelerator, "scaler", None)

    # -- set-up ---------------------------------------------------------------------------------------------------

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        self._forget_window()  # of an attempt that ran out of memory
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
        groups = list(self.method.optimizer_groups())
        if self._loraplus_lr_ratio is not None and self.optimizer is None:
            groups += loraplus_groups(
                self.model,
                learning_rate=self.args.learning_rate,
                ratio=self._loraplus_lr_ratio,
                weight_decay=self.args.weight_decay,
                decayed=self.get_decay_parameter_names(self.model),
                apart=[p for parameters, _ in groups for p in parameters],
            )
        own = [p for parameters, _ in groups for p in parameters]
        if self.optimizer is not None:
            held = {p for group in self.optimizer.param_groups for p in group["params"]}
            if not held.issuperset(own):
                raise UserError(
                    f"{self.method.name} adds parameters, which the given optimizer would not train: leave out "
                    "`optimizers` and choose by TrainingArguments(optim=…)"
                )
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
        self._examples_in_window = sum(examples_in(batch) for batch in batches)
        return batches, items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """As ``Trainer.compute_loss``; a training micro-batch counts by its share of the window's examples."""
        if self._keeps_losses and self._last is not None:
            labels = labels_of(inputs)  # the Trainer takes them out under label smoothing
            loss, outputs = super().compute_loss(model, inputs, True, *args, **kwargs)
            self._last.losses = losses_by_example(outputs["logits"].detach(), labels, self.shifts_labels)
            result = (loss, outputs) if return_outputs else loss
        else:
            result = super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        if self._share == 1.0:
            return result
        return (result[0] * self._share, result[1]) if isinstance(result, tuple) else result * self._share

    @contextlib.contextmanager
    def _weighted(self, share: float) -> Iterator[None]:
        """Weight the loss by ``share``, where it is a mean over examples."""
        self._share = share if self._by_examples else 1.0
        try:
            yield
        finally:
            self._share = 1.0

    def share_of(self, examples: int) -> float:
        """Weight of a micro-batch of so many examples, so that the mean over micro-batches is one over examples."""
        if not self._examples_in_window:
            return 1.0
        return examples * self.current_gradient_accumulation_steps / self._examples_in_window

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
        self._keeps_losses = self.method.example_losses
        with self.method.perturbed(self._step()):
            loss = self.plain_training_step(model, self._last, self.share_of(examples_in(inputs)))
        self._keeps_losses = False
        self._guard.saw(loss)
        self._micro_index += 1
        if self.accelerator.sync_gradients:
            self._end_window(model)
        return loss

    def _end_window(self, model: nn.Module) -> None:
        step = self._step(ended=True)
        finite = self._gradients_finite() and self._losses_finite()
        if finite and self.method.replays:
            self.method.extra_passes(step, Replay(self, model, self._window))
            finite = self._gradients_finite()
        self._window.clear()
        self._micro_index = 0
        self._ended = step if finite else None
        if finite:
            self._guard.passed()
            for recorder in self._recorders:
                recorder.ended(step, lambda: self._mean_over_processes(self._loss_again(model)))
        else:
            self.method.skipped(step)
            self._leave_out(step)
        if self._logs_after_this_step():
            self.method.probe(lambda: self._loss_again(model))

    def _leave_out(self, step: Step) -> None:
        """End a window that is not finite without an update."""
        if self._scaler is None:
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None
            self._guard.failed(step.index)
        elif self._losses_finite():  # an overflow, which the scaler skips and answers with a smaller scale
            self._guard.left_out()
        else:
            self._guard.failed(step.index)

    def _gradients_finite(self) -> bool:
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        return self._on_all(bool(torch.isfinite(norms_of(gradients)).all()))

    def _losses_finite(self) -> bool:
        return self._on_all(self._guard.losses_finite())

    def _on_all(self, flag: bool) -> bool:
        """Whether ``flag`` is True on every process."""
        if self.args.world_size == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.args.device), "mean") == 1)

    def _mean_over_processes(self, value: float) -> float:
        if self.args.world_size == 1:
            return value
        mean = self.accelerator.reduce(torch.tensor(value, dtype=torch.float64, device=self.args.device), "mean")
        return float(mean)

    @property
    def shifts_labels(self) -> bool:
        """Whether the model's loss predicts the label of a position at the position before it."""
        return bool(self._loss_shifts_labels)

    def plain_training_step(self, model: nn.Module, micro: MicroBatch, share: float) -> Tensor:
        """The Trainer's own step on a micro-batch whose loss counts by ``share``."""
        for recorder in self._recorders:
            recorder.passing(self._step())
        with self._weighted(share):
            return super().training_step(model, dict(micro.inputs), micro.items)

    def _loss_again(self, model: nn.Module) -> float:
        """Loss of the last micro-batch without gradient, under the same dropout masks."""
        assert self._last is not None
        plain = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        with rng_preserved(), torch.no_grad(), self.compute_loss_context_manager():
            self._last.rng.restore()
            inputs = self._prepare_inputs(dict(self._last.inputs))
            items = self._get_num_items_in_batch([inputs], self.args.device)  # of this micro-batch, not of the window
            return float(self.compute_loss(plain, inputs, num_items_in_batch=items))

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
            if self.skipped_steps:
                logs["skipped_steps"] = self.skipped_steps
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:  # every process comes here, one writes
            return
        folder = output_dir if output_dir is not None else self.args.output_dir
        save_method(self.method, folder, {STEPS: self._guard.state()})

    def _load_method(self, checkpoint: str) -> None:
        saved = load_method(checkpoint)
        if saved is None or saved.name != self.method.name:
            found = "no method" if saved is None else f"method {saved.name!r}"
            raise UserError(
                f"{checkpoint} holds {found}, this run is {self.method.name!r}: resume with the same method"
            )
        self.method.load_state_dict(saved.tensors)
        if STEPS in saved.metadata:
            self._guard.restore(saved.metadata[STEPS])

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
        for recorder in self._recorders_given():
            recorder.check(self.model)


class _MethodCallback(TrainerCallback):
    """Calls the method around the optimizer's update."""

    def __init__(self, trainer: MethodMixin) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.updating is not None:
            self.trainer.method.before_update(self.trainer.updating)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.updating is not None and not self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer.method.after_update(self.trainer.updating)


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


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _averages_over_examples(model: nn.Module) -> bool:
    """Whether the model's loss is a mean over examples, so that a count of items does not apply to it."""
    return getattr(_base(model), "loss_type", None) in ("ForSequenceClassification", "ForImageClassification")
