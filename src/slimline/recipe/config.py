"""Validated configuration whose errors are one sentence, with the nearest known name where one is unknown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator

from slimline.basics.errors import SlimlineError, shown, unknown


class Config(BaseModel):
    """Frozen data that is checked when it is made; a mistake raises `SlimlineError`, not pydantic's report."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _one_sentence(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        try:
            return handler(data)
        except ValidationError as e:
            raise sentence(e, cls) from e


def sentence(error: ValidationError, model: type[BaseModel]) -> SlimlineError:
    """The first mistake pydantic found in data for `model`, for people."""
    first = error.errors(include_url=False)[0]
    kind, context = first["type"], first.get("ctx", {})
    place = [shown(part).strip("'") for part in first["loc"] if not _branch(part, model)]
    where = ".".join(place)
    name = model.__name__
    value = first["input"]
    if kind == "extra_forbidden":
        fields = [field.alias or key for key, field in model.model_fields.items()]
        return unknown(f"field in {name} called", str(first["loc"][-1]), fields)
    if kind == "union_tag_invalid":
        tags = [tag.strip(" '") for tag in str(context["expected_tags"]).split(",")]
        return unknown("step", str(context["tag"]), tags)
    if kind == "union_tag_not_found":
        return SlimlineError(f"{where} of {name} does not say which step it is: give it a 'step: NAME'.")
    if kind == "missing":
        return SlimlineError(f"{name} needs {where}: give it.")
    if kind == "literal_error" and place[-1:] and isinstance(value, str):
        field = next(part for part in reversed(place) if not part.isdigit())
        return unknown(f"{name} with {field}", value, _choices(model, place))
    text = first["msg"].removeprefix("Input ").replace("should", "must").partition(",")[0]
    text = text.replace("dictionary or object to extract fields from", "mapping of fields").replace("tuple", "list")
    return SlimlineError(f"{where + ' of ' if where else ''}{name} is {shown(value)} but {text}.")


def _branch(part: int | str, model: type[BaseModel]) -> bool:
    """Whether part of a place is what pydantic calls a branch of a union, which no user has written."""
    plain = isinstance(part, int) or part in model.model_fields
    return not plain and (not str(part).isidentifier() or part in ("bool", "int", "float", "str"))


def _choices(model: type[BaseModel], place: list[str]) -> list[str]:
    """The strings a Literal field (perhaps optional) takes."""
    field = model.model_fields.get(place[0])
    choices: list[str] = []
    pending: list[Any] = [field.annotation if field else None]
    while pending:
        annotation = pending.pop()
        pending += [a for a in get_args(annotation) if not isinstance(a, str)]
        choices += [a for a in get_args(annotation) if isinstance(a, str)]
    return choices


def as_mapping(loaded: Any, where: str) -> Mapping[str, Any]:
    """What a YAML file holds, if it is a mapping."""
    if not isinstance(loaded, Mapping):
        raise SlimlineError(f"{where} holds {type(loaded).__name__}, not a mapping with 'steps:'.")
    return loaded
