"""Parts of a weight space: its layers, its transformer blocks, attention and MLP, or whatever a pattern tells apart."""

import re

from analysis.core.space import WeightSpace
from analysis.layer_names import NO_NUMBER, kind_of, split_layer
from bilora.errors import UserError


def blocks_of(space: WeightSpace, by: str = "layer") -> dict[str, WeightSpace]:
    """The parts of ``space`` as spaces on the same model, in the order of its parameters: diagonal blocks of a Hessian.

    Args:
        space: the whole.
        by: ``"layer"`` (each layer's weights; in LoRA space its A and B together), ``"number"`` (each transformer
            block: the first number in the layer's name), ``"kind"`` (attention, mlp, other), or a regular expression:
            the parameters in whose name it is found, told apart by its groups if it has any.

    Raises:
        UserError: a pattern that is no regular expression or matches nothing.
    """
    names: dict[str, list[str]] = {}
    for parameter in space.parameters:
        block = _block_name(parameter, by)
        if block is not None:
            names.setdefault(block, []).append(parameter)
    if not names:
        raise UserError(
            f"no parameter of the {space.name} space matches {by!r}: one is {next(iter(space.parameters))!r}"
        )
    return {block: space.restricted(block, chosen) for block, chosen in names.items()}


def layer_of(parameter: str) -> str:
    """The layer a parameter belongs to: its name without the last part, if it has several."""
    return parameter.rpartition(".")[0] or parameter


def _block_name(parameter: str, by: str) -> str | None:
    layer = layer_of(parameter)
    if by == "layer":
        return layer
    if by == "kind":
        return kind_of(layer)
    if by == "number":
        _, number, _ = split_layer(layer)
        return "none" if number == NO_NUMBER else str(number)
    try:
        found = re.search(by, parameter)
    except re.error as error:
        raise UserError(f"{by!r} is not a regular expression: {error}") from error
    if found is None:
        return None
    return ".".join(group for group in found.groups() if group) or by
