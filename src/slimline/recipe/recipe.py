"""Recipes: the steps of a compression, in an order that has a meaning, with all that decides what they do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from pydantic_core import PydanticCustomError

from slimline.basics.errors import SlimlineError, unknown
from slimline.recipe.budget import Budget
from slimline.recipe.config import Config, as_mapping
from slimline.recipe.criterion import importable, name_of
from slimline.recipe.registry import configs
from slimline.recipe.step import Step

ORDER = {
    ("quantization", "structural"): "its integer grids belong to the shapes they were measured with",
    ("quantization", "sparse"): "its weights are on integer grids already",
    ("quantization", "sharing"): "its weights are on integer grids already",
    ("quantization", "training"): "training moves weights off their integer grids",
    ("quantization", "recovery"): "training moves weights off their integer grids",
    ("quantization", "quantization"): "the values are on integer grids already",
    ("sharing", "structural"): "what is left of the weights may change, and no longer share values",
    ("sharing", "sparse"): "what is left of the weights may change, and no longer share values",
    ("sharing", "training"): "training takes the values apart that weights share",
    ("sharing", "recovery"): "training takes the values apart that weights share, unless it stands right behind",
}
"""What may not follow what, directly or later, and why: (kind before, kind after)."""


LONGEST = 256_000  # characters of a recipe's YAML
DEEPEST = 20  # mappings and lists inside each other


class _Loader(yaml.SafeLoader):
    """Reads what a recipe needs of YAML: no aliases, by which a kilobyte can stand for gigabytes, and no depths."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not for recipes, write out what they stand for",
                problem_mark=event.start_mark,  # type: ignore[arg-type]
            )
        if self.depth >= DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"it nests more than {DEEPEST} levels deep", problem_mark=event.start_mark
            )
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Dumper(yaml.SafeDumper):
    """Quotes text with Unicode's own line breaks, which PyYAML would write plainly and read as folded."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        breaks = any(c in data for c in "\x85\u2028\u2029")
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if breaks else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def _step(data: Any) -> Any:
    """The step that a mapping with ``step: NAME`` describes."""
    if isinstance(data, Step):
        return data
    name = data.get("step") if isinstance(data, Mapping) else None
    if name is None:
        raise PydanticCustomError("union_tag_not_found", "no step is named")
    known = configs()
    if not isinstance(name, str) or name not in known:
        raise PydanticCustomError("union_tag_invalid", "unknown", {"tag": name, "expected_tags": ", ".join(known)})
    return known[name].model_validate(dict(data))


AnyStep = Annotated[SerializeAsAny[Step], BeforeValidator(_step)]


class Recipe(Config):
    """All that decides what a compression does; with the model and the data it can be replayed.

    Attributes
    ----------
    steps : in the order in which they are done.
    target : the runtime the result is for; None takes the framework's usual one.
    budget : the limits.
    seed : of every random choice.
    batch_sizes : at which latency is measured.
    threads : with which the artifact runs.
    description : for people.
    fit : how much is pruned is decided by the budget instead of the steps: as little as its limits on latency, size,
        memory and MACs allow, found by measurement on the target; without such limits, as much as ``max_drop`` allows
        on the selection samples.
    """

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    description: str = ""
    steps: tuple[AnyStep, ...]
    target: str | None = None
    budget: Budget = Budget()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    batch_sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 32)
    threads: Annotated[int, Field(ge=1)] = 1
    fit: bool = False

    @model_validator(mode="after")
    def _meaningful(self) -> Recipe:
        check_order(self.steps, follows=True)
        return self

    def needs(self) -> dict[str, str]:
        """Roles of samples that the steps read, each with the name of the first step that does."""
        needed: dict[str, str] = {}
        for step in self.steps:
            for role in step.needs:
                needed.setdefault(role, type(step).__name__)
        return needed

    def dump(self) -> str:
        """YAML with every field in full; `parse` gives an equal recipe.

        Raises
        ------
        SlimlineError : a criterion that is a function which no name leads to, such as a lambda.
        """
        for step in self.steps:
            if not importable(criterion := getattr(step, "criterion", "")):
                raise SlimlineError(
                    f"The criterion of {step.step} is {name_of(criterion)}, which a run that goes on later could not "
                    "import: define it as a function at the top of a module, or use slimline.apply."
                )
        return yaml.dump(
            self.model_dump(mode="json", by_alias=True), Dumper=_Dumper, sort_keys=False, allow_unicode=True
        )


def check_order(
    steps: Sequence[Step], history: Sequence[str] = (), follows: bool = False, quantized: bool = False
) -> None:
    """Refuse an order that has no meaning.

    Parameters
    ----------
    steps : to be done.
    history : names of the steps that the model already went through.
    follows : whether there is something to recover before the first step: the model was compressed before, learns from
        a teacher that is not itself, or is not known yet.
    quantized : whether the model is on integer grids, whatever brought it there.
    """
    known = configs()
    earlier: list[tuple[str, str]] = [(name, known[name].kind) for name in history if name in known]
    if quantized and not any(kind == "quantization" for _, kind in earlier):
        earlier.append(("quantization", "quantization"))
    for position, step in enumerate(steps):
        name = type(step).__name__
        joined = position > 0 and steps[position - 1].kind == "sharing" and steps[position - 1].joins(step)
        for before, kind in earlier:
            if (kind == "sharing" and joined) or before in step.refines:
                continue
            if reason := ORDER.get((kind, step.kind)):
                raise SlimlineError(f"{name} cannot follow {before}, because {reason}: put it before {before}.")
        if step.kind == "recovery" and not earlier and not follows:
            raise SlimlineError(f"{name} comes first and has nothing to recover: put it after the step it repairs.")
        following = steps[position + 1] if position + 1 < len(steps) else None
        if problem := step.misplaced([before for before, _ in earlier], following):
            raise SlimlineError(problem)
        earlier.append((name, step.kind))


def parse(text: str, where: str = "The recipe") -> Recipe:
    """The recipe in YAML `text`; `where` names it in messages."""
    if len(text) > LONGEST:
        raise SlimlineError(f"{where} has more than {LONGEST} characters, which no recipe has: check what it is.")
    try:
        loaded = yaml.load(text, _Loader)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        raise SlimlineError(f"{where} is not YAML{place}: {getattr(e, 'problem', None) or 'unreadable'}.") from e
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as e:
        # Numbers of thousands of digits, dates in a thirteenth month, tags on what they do not fit.
        raise SlimlineError(f"{where} holds a value that cannot be read: write plain numbers and words.") from e
    if isinstance(loaded, list):
        loaded = {"steps": loaded}
    return Recipe.model_validate(dict(as_mapping(loaded, where)))


def presets() -> dict[str, Recipe]:
    """The recipes that come with slimline, by name."""
    folder = resources.files("slimline.recipe") / "presets"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {f.name.removesuffix(".yaml"): parse(f.read_text("utf-8"), f.name) for f in files}


def load_recipe(
    source: str | Path | Step | Sequence[Step] | Recipe,
    target: str | None = None,
    trainable: bool = True,
    /,
    **settings: Any,
) -> Recipe:
    """The recipe that `source` names.

    Parameters
    ----------
    source : ``"auto"``, a preset's name, the path of a YAML file, a step, a list of steps or a recipe.
    target : the runtime, for a recipe that names none.
    trainable : whether there is training data; ``auto`` means ``balanced`` with it and ``int8`` without, each only as
        strong as the budget needs.
    settings : fields of `Recipe` that replace the recipe's own, ``target`` too; None leaves them.
    """
    if isinstance(source, Recipe):
        recipe = source
    elif isinstance(source, Step):
        recipe = Recipe(steps=(source,))
    elif isinstance(source, str | Path):
        recipe = _named(str(source), trainable)
    else:
        if not isinstance(source, Iterable) or not all(isinstance(step, Step) for step in source):
            raise SlimlineError("A recipe given as a list must hold steps, such as slimline.ChannelPruning(ratio=0.5).")
        recipe = Recipe(steps=tuple(source))
    overrides = {key: value for key, value in settings.items() if value is not None}
    if recipe.target is None and target is not None:
        overrides.setdefault("target", target)
    return Recipe.model_validate({**{name: getattr(recipe, name) for name in Recipe.model_fields}, **overrides})


def _named(name: str, trainable: bool) -> Recipe:
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        try:
            with path.open(encoding="utf-8") as file:
                return parse(file.read(LONGEST + 1), str(path))
        except (OSError, UnicodeDecodeError) as e:
            raise SlimlineError(f"The recipe {path} cannot be read: {getattr(e, 'strerror', None) or e}.") from e
    known = presets()
    if name == "auto":
        return known["balanced" if trainable else "int8"].model_copy(update={"fit": True})
    if name not in known:
        raise unknown("recipe", name, ["auto", *known])
    return known[name]
