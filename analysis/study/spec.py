"""The study file: which methods are trained with which seeds on what, and what is measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from analysis.registry import MEASURES
from analysis.study.yaml_file import read_yaml
from bilora.errors import UserError
from bilora.methods import build_method
from bilora.tasks import LoraSpec, TaskSpec

Seed = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Label = Annotated[str, Field(min_length=1, max_length=60)]
Split = Literal["train", "validation"]


VARIANTS = ("kind", "plane", "m")
"""Settings by which rows of one measure are told apart: measurements that differ in one may stand in one study."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MethodEntry(_Section):
    """One compared method. In the file its settings stand beside ``method``.

    Attributes:
        method: registry name or alias, or ``path/to/file.py:Class``.
        settings: its settings over their defaults.
        training: ``TrainingArguments`` that differ from the study's for this method.
    """

    method: str
    settings: dict[str, Any] = {}
    training: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        return _gathered(value, ("method", "training"))

    @model_validator(mode="after")
    def _check(self) -> Self:
        build_method(self.method, self.settings)
        return self

    def all_settings(self) -> dict[str, Any]:
        """The settings with their defaults."""
        return build_method(self.method, self.settings).settings()


class MeasureEntry(_Section):
    """One measurement of every trained adapter. In the file its settings stand beside ``measure``.

    Attributes:
        measure: registry name.
        spaces: where it is taken; default the full and the LoRA space, as far as the measure has them. Spaces that a
            method lacks are left out for it (full fine-tuning has no LoRA space).
        split: which examples.
        examples: how many of them (the first of the task's stratified order), None for all.
        batch_size: examples a forward pass; does not change exact measures beyond rounding.
        settings: the measure's settings over their defaults.
    """

    measure: str
    spaces: tuple[str, ...] = ()
    split: Split = "validation"
    examples: PositiveInt | None = None
    batch_size: PositiveInt = 32
    settings: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        return _gathered(value, ("measure", "spaces", "split", "examples", "batch_size"))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.measure not in MEASURES:
            raise UserError(f"unknown measure {self.measure!r}: choose one of {', '.join(MEASURES)}")
        known = MEASURES[self.measure].offered
        for space in self.spaces:
            if space not in known:
                has = ", ".join(known) if any(known) else "no spaces: leave spaces out"
                raise PydanticCustomError(
                    "space",
                    "{text}",
                    {"text": f"{self.measure} has no space {space!r}: it has {has}", "at": ("spaces",)},
                )
        if len(set(self.spaces)) < len(self.spaces):
            raise PydanticCustomError("space", "a space is named twice: name it once", {"at": ("spaces",)})
        try:
            self.all_settings()
        except ValidationError as error:
            where, text = _first(error, MEASURES[self.measure].settings)
            raise PydanticCustomError("setting", "{text}", {"text": text, "at": where}) from error
        return self

    def all_settings(self) -> BaseModel:
        """The measure's settings with their defaults."""
        return MEASURES[self.measure].settings(**self.settings)

    def settings_for(self, seed: int) -> BaseModel:
        """The settings for an adapter trained with ``seed``: every training seed is measured along draws of its own.

        Methods of one training seed share them. Were they the same for all seeds, intervals over seeds would leave out
        the spread over draws.
        """
        settings = self.all_settings()
        drawn = getattr(settings, "seed", None)
        return settings if drawn is None else settings.model_copy(update={"seed": drawn + seed})

    def all_spaces(self) -> tuple[str, ...]:
        """The spaces asked for, or the measure's defaults, in the measure's own order."""
        measure = MEASURES[self.measure]
        return tuple(s for s in measure.offered if s in (self.spaces or measure.spaces))


class StudySpec(_Section):
    """A study: methods × seeds, each trained once and measured in every way asked for.

    Attributes:
        name: names the output folder and the ``study`` column.
        task: what is trained on.
        model: base model: a built-in, a folder, a ``.gguf`` file or a hub name.
        lora: the adapter.
        training: ``transformers.TrainingArguments`` by name, for every method.
        methods: label → method, in the order of tables and figures.
        seeds: training seeds.
        measures: what is measured.
        baseline: label of the method the others are compared with; default the first.
        record: record every run every so many steps, for the measure ``dynamics`` (:class:`bilora.training.Recorder`).
        output: where results go; default ``runs/<name>``.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)
    task: TaskSpec
    model: str = Field(min_length=1)
    lora: LoraSpec = LoraSpec()
    training: dict[str, Any] = {}
    methods: dict[Label, MethodEntry] = Field(min_length=1)
    seeds: tuple[Seed, ...] = Field(min_length=1)
    measures: tuple[MeasureEntry, ...] = Field(min_length=1)
    baseline: str | None = None
    record: PositiveInt | None = None
    output: Path | None = None

    @field_validator("seeds")
    @classmethod
    def _unique(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        repeated = next((seed for seed in seeds if seeds.count(seed) > 1), None)
        if repeated is not None:
            raise UserError(f"seed {repeated} is given twice: give each once")
        return seeds

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.baseline is not None and self.baseline not in self.methods:
            raise PydanticCustomError(
                "baseline",
                "{text}",
                {"text": f"no method {self.baseline!r}: choose one of {', '.join(self.methods)}", "at": ("baseline",)},
            )
        seen: dict[tuple[Any, ...], int] = {}
        for i, entry in enumerate(self.measures):
            if entry.measure == "dynamics" and self.record is None:
                text = "dynamics needs recorded runs: set record, for example to 10"
                raise PydanticCustomError("record", "{text}", {"text": text, "at": ("measures", str(i))})
            settings = entry.all_settings()
            variant = tuple(getattr(settings, name, None) for name in VARIANTS)
            for space in entry.all_spaces():
                first = seen.setdefault((entry.measure, space, entry.split, variant), i)
                if first != i:
                    text = f"measures the same as measures.{first}: join the two, so that each row has one source"
                    raise PydanticCustomError("repeated", "{text}", {"text": text, "at": ("measures", str(i))})
        return self

    @property
    def baseline_label(self) -> str:
        """The method the others are compared with."""
        return self.baseline or next(iter(self.methods))

    @property
    def folder(self) -> Path:
        """Where results go."""
        return self.output or Path("runs") / self.name

    def training_of(self, label: str) -> dict[str, Any]:
        """``TrainingArguments`` of the method ``label``: the study's, and over them its own."""
        return {**self.training, **self.methods[label].training}


def read_study(path: Path) -> StudySpec:
    """The study in the YAML file ``path``.

    Raises:
        UserError: one line that names the file, the key and the cure.
    """
    content = read_yaml(path)
    try:
        return StudySpec(**content)
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error, StudySpec)}") from error


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """The first finding about a ``model`` as ``path.of.keys: cause and cure``, and how many more there are."""
    where, text = _first(error, model)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return ": ".join([".".join(where), text] if where else [text]) + more


def _gathered(value: Any, fields: tuple[str, ...]) -> Any:
    """The mapping of the file with everything but ``fields`` moved under ``settings``."""
    if not isinstance(value, Mapping):
        return value
    known = {key: value[key] for key in fields if key in value}
    rest = {str(key): entry for key, entry in value.items() if key not in fields}
    return {**known, "settings": rest}


def _first(error: ValidationError, model: type[BaseModel]) -> tuple[tuple[str, ...], str]:
    """Where the first problem lies (path of keys) and one line that says what it is and what would be right."""
    problem = error.errors()[0]
    where = tuple(str(part) for part in problem["loc"] if part != "[key]")
    context = problem.get("ctx", {})
    if "at" in context:
        return where + tuple(context["at"]), context.get("text", problem["msg"])
    if problem["type"] == "extra_forbidden":
        return where, f"unknown key: choose among {', '.join(_keys(model, where[:-1]))}"
    if problem["type"] == "missing":
        return where, "is missing: add it"
    if problem["type"] == "value_error":
        return where, str(context["error"])
    text = problem["msg"][:1].lower() + problem["msg"][1:]
    return where, f"{text}, not {problem['input']!r}".replace("\n", " ")


def _keys(model: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    """The keys that may stand at ``path`` below ``model``."""
    for part in path:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return list(model.model_fields)
