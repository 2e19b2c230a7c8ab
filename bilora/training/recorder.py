"""Records a run: where its factors are and what perturbs them, every few steps (:mod:`bilora.training.recording`).

What a method is *said* to do is not asked: the weights in force while the descent gradient is taken are compared with
those at rest, so that any method, also a user's own, is recorded as it acts.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bilora.adapters.auxiliary import MODULE_NAME, AuxiliaryPairs
from bilora.adapters.bases import column_basis, off_columns, off_rows, row_basis
from bilora.adapters.layers import AdaptedLayer, adapted_layers
from bilora.adapters.swap import swapped
from bilora.errors import UserError
from bilora.methods import Method, Step
from bilora.methods.checks import check_count, check_plain_factors
from bilora.training.recording import (
    FILE_NAME,
    About,
    LayerMoment,
    Moment,
    is_recorded,
    join_moments,
    moment_files,
    read_recording,
    reopen,
    step_of,
    write_moment,
)

Losses = Callable[[], float]
"""The loss of the step's last micro-batch at the weights in force, over all processes, under the same dropout masks."""


class Recorder(TrainerCallback):
    """Give it to a Trainer that runs a method: ``BiLoraTrainer(…, callbacks=[Recorder("run", every=10)])``.

    What is recorded can be read while training goes on (:func:`bilora.training.recording.read_recording`). A resumed
    run goes on after its checkpoint: later moments of the interrupted run are dropped and recorded again. Of several
    processes the first one writes. Steps that are not finite update nothing and are not recorded.

    Args:
        folder: the run's.
        every: optimizer steps between moments; the last step is always one.
        losses_every: steps between moments with the loss with and without the perturbation, which cost a forward pass
            each; None: five times ``every``.

    Raises:
        UserError: a number is below 1; in the Trainer: the model has no plain LoRA adapter; when training begins: the
            folder holds a recording and the run does not go on from a checkpoint, or one with another ``every``.
    """

    def __init__(self, folder: str | Path, every: int = 10, losses_every: int | None = None) -> None:
        check_count("record", "every", every)
        check_count("record", "losses_every", 5 * every if losses_every is None else losses_every)
        self.folder = Path(folder)
        self.every = every
        self.losses_every = 5 * every if losses_every is None else losses_every
        self._layers: dict[str, AdaptedLayer] = {}
        self._model: nn.Module | None = None
        self._method: Method | None = None
        self._auxiliary: AuxiliaryPairs | None = None
        self._in_force: dict[nn.Parameter, Tensor] = {}
        self._taken: Moment | None = None

    @staticmethod
    def check(model: nn.Module) -> dict[str, AdaptedLayer]:
        """The layers that would be recorded.

        Raises:
            UserError: the model has no LoRA adapter, or one whose merged weight is not ``W0 + s·B·A``.
        """
        layers = adapted_layers(model)
        check_plain_factors("recording", layers)
        return layers

    # -- called by the trainer ------------------------------------------------------------------------------------

    def watch(self, model: nn.Module, method: Method) -> None:
        """Training of ``model`` with ``method`` is about to begin."""
        self._layers = self.check(model)
        self._model, self._method = model, method
        self._forget()

    def wants(self, step: Step) -> bool:
        """Whether this step is one to record."""
        return step.index % self.every == 0 or step.index == step.total - 1

    def passing(self, step: Step) -> None:
        """A forward pass at the weights now in force follows; the last one of a step counts."""
        if not self.wants(step):
            return
        self._in_force = {}
        for layer in self._layers.values():
            for parameter in (layer.A, layer.B, layer.base_weight):
                self._in_force[parameter] = parameter.data

    @torch.no_grad()
    def ended(self, step: Step, loss: Losses) -> None:
        """The passes of ``step`` are done, its gradient is complete, and the weights are at rest."""
        if not self.wants(step):
            return
        numbers = {} if step.index % self.losses_every else self._losses(loss)
        rates = [step.rates[layer.A] for layer in self._layers.values() if layer.A in step.rates]
        if rates:
            numbers["learning_rate"] = rates[0]
        layers = {name: self._layer(name, layer, step) for name, layer in self._layers.items()}
        self._taken = Moment(step.index, layers, numbers)
        self._in_force = {}

    # -- called by transformers -----------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop moments that a resumed run will see again."""
        if self._method is None:
            raise UserError("recording needs a Trainer that runs a method: use BiLoraTrainer, also for plain lora")
        self._auxiliary = getattr(self._model, MODULE_NAME, None)
        self._about = About(self._method.name, self._method.settings(), args.seed, self.every, state.max_steps)
        if not state.is_world_process_zero:
            return
        if state.global_step:
            self._go_on(state.global_step)
        elif (self.folder / FILE_NAME).exists():
            raise UserError(f"{self.folder} holds the recording of a finished run: name another folder")
        for path in moment_files(self.folder):
            if step_of(path) >= state.global_step:
                path.unlink()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the moment, with what the method says of its update."""
        if self._taken is None or self._method is None:
            return
        moment = replace(self._taken, numbers={**self._method.metrics(), **self._taken.numbers})
        self._taken = None
        if state.is_world_process_zero:
            write_moment(self.folder, moment, self._about)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write where the factors ended, and put all moments into one file."""
        if state.is_world_process_zero and state.global_step >= state.max_steps:
            end = {name: LayerMoment(x.A.data, x.B.data, x.scale) for name, x in self._layers.items()}
            write_moment(self.folder, Moment(state.global_step, end), self._about)
            join_moments(self.folder)
        self._forget()

    # -------------------------------------------------------------------------------------------------------------

    def _go_on(self, step: int) -> None:
        """Whether what is there can be continued from ``step``."""
        if not is_recorded(self.folder):
            return
        recording = read_recording(self.folder)
        if recording.steps[0] < step and recording.about.every != self.every:
            raise UserError(f"the run in {self.folder} is recorded every {recording.about.every} steps: go on so")
        reopen(self.folder)

    def _losses(self, loss: Losses) -> dict[str, float]:
        moved = {parameter: tensor for parameter, tensor in self._in_force.items() if _moved(parameter, tensor)}
        numbers = {"loss": loss()}
        if self._auxiliary is not None:
            with self._auxiliary.active():
                numbers["loss_perturbed"] = loss()
        elif moved:
            with swapped(moved):
                numbers["loss_perturbed"] = loss()
        return numbers

    def _layer(self, name: str, layer: AdaptedLayer, step: Step) -> LayerMoment:
        pair = self._pair(name)
        trained = (layer.A, layer.B) if pair is None else (layer.A, layer.B, pair[0], pair[1])
        return LayerMoment(
            A=layer.A.data.clone(),
            B=layer.B.data.clone(),
            scale=layer.scale,
            eps_A=self._difference(layer.A),
            eps_B=self._difference(layer.B),
            auxiliary_A=pair[0].data.clone() if pair else None,
            auxiliary_B=pair[1].data.clone() if pair else None,
            auxiliary_scale=pair[2] if pair else 1.0,
            noise=self._noise(layer),
            gradients=tuple(
                math.nan if p.grad is None else float(p.grad.double().norm()) / step.loss_scale for p in trained
            ),
        )

    def _pair(self, name: str) -> tuple[nn.Parameter, nn.Parameter, float] | None:
        """A2, B2, s2."""
        if self._auxiliary is None:
            return None
        B, A, scale = self._auxiliary.pairs()[self._auxiliary.names.index(name)]
        return A, B, scale

    def _difference(self, parameter: nn.Parameter) -> Tensor | None:
        """What was added to a parameter while the descent gradient was taken."""
        tensor = self._in_force.get(parameter)
        return tensor - parameter.data if tensor is not None and _moved(parameter, tensor) else None

    def _noise(self, layer: AdaptedLayer) -> tuple[float, float] | None:
        """‖E‖² and what of it lies outside {B·X + Y·A}."""
        difference = self._difference(layer.base_weight)
        if difference is None:
            return None
        E = (difference.T if layer.transposed else difference).double()
        outside = off_rows(off_columns(E, column_basis(layer.B.data)), row_basis(layer.A.data))
        return float(E.square().sum()), float(outside.square().sum())

    def _forget(self) -> None:
        self._in_force, self._taken = {}, None


def _moved(parameter: nn.Parameter, tensor: Tensor) -> bool:
    return tensor.data_ptr() != parameter.data.data_ptr()
