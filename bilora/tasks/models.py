"""Base models and their tokenizers: built-ins, local folders, GGUF files, hub names."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from bilora.errors import UserError
from bilora.seeds import generator_for
from bilora.tasks.packages import MINILM, SMOLLM2
from bilora.tasks.spec import TaskKind

BUILT_IN_MODELS = {"minilm": MINILM, "smollm2": SMOLLM2}
"""``minilm``: all-MiniLM-L6-v2, BERT architecture, 22.7 M; ``smollm2``: SmolLM2-135M-Instruct, Llama, 134.5 M."""


@dataclass(frozen=True)
class ModelSpec:
    """Where a model is loaded from.

    Attributes:
        name: what the user wrote.
        location: local folder, or hub name.
        gguf_file: the file inside ``location``, for a GGUF model.
        local: whether everything is on this machine; if so the network is never asked.
    """

    name: str
    location: str
    gguf_file: str | None
    local: bool

    def loading_arguments(self) -> dict[str, Any]:
        """Keyword arguments for every ``from_pretrained`` call."""
        # Given explicitly: left out, transformers asks at the terminal whether to run a repository's own code.
        arguments: dict[str, Any] = {"local_files_only": self.local, "trust_remote_code": False}
        return arguments | ({"gguf_file": self.gguf_file} if self.gguf_file else {})


def resolve_model(name: str) -> ModelSpec:
    """Find out what ``name`` stands for: a built-in, a ``.gguf`` file, a local folder, else a hub name.

    Raises:
        UserError: a path that is not there, a folder that holds no base model, a package that is missing.
    """
    if not name:
        raise UserError(f"the model has no name: name a folder, a .gguf file, a hub model, or {_built_ins()}")
    path = BUILT_IN_MODELS[name].path() if name in BUILT_IN_MODELS else Path(name)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UserError(f"no model file at {name}: check the path")
        if find_spec("gguf") is None:
            raise UserError(f"model {name} is a GGUF file, which needs a reader: run `pip install 'bilora[gguf]'`")
        return ModelSpec(name, str(path.parent), path.name, local=True)
    if path.is_dir():
        if not (path / "config.json").is_file():
            what = "an adapter" if (path / "adapter_config.json").is_file() else "no config.json"
            raise UserError(f"folder {name} holds {what}, not a base model: name the model's own folder")
        return ModelSpec(name, str(path), None, local=True)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"no model folder at {name}: name a folder, a .gguf file, or {_built_ins()}")
    return ModelSpec(name, name, None, local=False)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of model ``name``, padding on the right, with a padding token (the end token if it has none).

    Raises:
        UserError: the model or its tokenizer is not there, or has neither padding nor end token.
    """
    spec = resolve_model(name)
    with _loading(spec):
        tokenizer = AutoTokenizer.from_pretrained(spec.location, **spec.loading_arguments())
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"the tokenizer of {name} has no padding and no end token: add one to its tokenizer files")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str, kind: TaskKind, num_labels: int | None = None, seed: int = 0, *, tokenizer: Any | None = None
) -> Any:
    """Load a base model in float32 with the head that ``kind`` needs, on the CPU, in evaluation mode.

    Weights that the files lack (a new classifier) are drawn from ``seed`` alone, so that every compared method starts
    from the same head; PyTorch's global generator is left as it was.

    Args:
        name: see :func:`resolve_model`.
        kind: ``classification`` or ``causal_lm``.
        num_labels: number of classes, for ``classification``.
        seed: seed of a new head.
        tokenizer: the model's tokenizer, if it is at hand: gives the padding token to a model that has none.

    Raises:
        UserError: no such model, weights not in safetensors, no such head for it, a head for other classes.
    """
    spec = resolve_model(name)
    arguments = spec.loading_arguments() | {"dtype": torch.float32}
    if spec.gguf_file is None:
        arguments["use_safetensors"] = True
    auto: Any = AutoModelForCausalLM
    if kind == "classification":
        if num_labels is None:
            raise ValueError("classification needs num_labels")
        auto = AutoModelForSequenceClassification
        arguments |= {"num_labels": num_labels, "problem_type": "single_label_classification"}
    with _loading(spec), seeded(seed, "new weights"):
        model = auto.from_pretrained(spec.location, **arguments)
    if spec.gguf_file is not None:
        _forget_quantization(model)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = (tokenizer or load_tokenizer(name)).pad_token_id
    return model


@contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Let code that draws from PyTorch's global CPU generator draw from a stream named by ``parts``, then put it back.

    For library code that takes no generator of its own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator_for(*parts).initial_seed())
        yield


def _forget_quantization(model: Any) -> None:
    """A GGUF model comes out dequantized but still marked as quantized, so that its saved copies would not load."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None


def _built_ins() -> str:
    return " or ".join(BUILT_IN_MODELS)


@contextmanager
def _loading(spec: ModelSpec) -> Iterator[None]:
    """Turn what ``from_pretrained`` raises about a model into one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        if spec.local:
            raise UserError(f"model {spec.name} cannot be loaded: {detail}") from error
        raise UserError(
            f"model {spec.name!r} is not built in ({_built_ins()}), not a local folder, and the hub did not give it: "
            f"{detail}"
        ) from error
