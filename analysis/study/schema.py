"""JSON schema of study files, for editors that complete and check YAML."""

from typing import Any

from analysis.registry import MEASURES
from analysis.study.spec import StudySpec
from bilora.methods import METHODS

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def study_schema() -> dict[str, Any]:
    """The schema of :class:`analysis.study.spec.StudySpec` as it stands in a file.

    Settings of methods and measures stand beside their name there, so that each name brings its own.
    """
    schema = StudySpec.model_json_schema()
    definitions = schema["$defs"]
    definitions["MethodEntry"] = _entry(
        definitions["MethodEntry"],
        "method",
        {name: {key: {"default": value} for key, value in cls().settings().items()} for name, cls in METHODS.items()},
    )
    settings = {name: measure.settings.model_json_schema() for name, measure in MEASURES.items()}
    for name in settings:
        definitions |= settings[name].pop("$defs", {})
    definitions["MeasureEntry"] = _entry(
        definitions["MeasureEntry"], "measure", {name: of.get("properties", {}) for name, of in settings.items()}
    )
    definitions["MeasureEntry"]["properties"]["measure"] = {"enum": list(MEASURES)}
    return {"$schema": DIALECT, "title": "bilora study", **{k: v for k, v in schema.items() if k != "title"}}


def _entry(schema: dict[str, Any], key: str, settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """``schema`` without its ``settings``; instead, where ``key`` has a known name, that name's own properties."""
    properties = {name: value for name, value in schema["properties"].items() if name != "settings"}
    own = [
        {
            "if": {"properties": {key: {"const": name}}},
            "then": {"properties": {**properties, **of}, "additionalProperties": False},
        }
        for name, of in settings.items()
    ]
    kept = {name: value for name, value in schema.items() if name != "additionalProperties"}
    return {**kept, "properties": properties, "required": [key], "allOf": own}
