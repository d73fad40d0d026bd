"""The description of an exported program, from JSON of anybody: typed, bounded, and free of what torch would run.

torch's own reader turns parts of a description into code: names of values and arguments become Python source, targets
are looked up by attribute, formulas and guards are evaluated. `read` builds torch's schema objects itself, so strictly
that each name is an identifier, each target is on the list of `operators`, each formula in the grammar of
`expressions` (and handed on as a formula, never as text), and leaves out what slimline does not need: guards, stack
traces, origins of nodes, custom notes.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import keyword
import re
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any
from urllib.parse import quote, unquote

from torch._export.serde import schema
from torch._export.serde.union import _Union

from slimline.files import strictjson
from slimline.files.strictjson import Malformed
from slimline.frameworks.torch import allowed
from slimline.frameworks.torch.expressions import SYMBOL, Expressions, text_of

TEXT, NODES = 2000, 200_000
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,499}")
# Globals of the source that torch writes for a graph; a value of that name would hide one.
_TAKEN = frozenset(
    (
        *("self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree", "math", "operator", "_operator"),
        *("getattr", "dtype", "Tensor", "forward", "bool", "int", "float", "slice", "tuple", "list", "dict", "range"),
    )
)
_STACK_PART = re.compile(r"[^\x00-\x1f\x7f()\[\],;]*")
_CONTAINERS = {"builtins.tuple": "null", "builtins.list": "null", "builtins.dict": None}
_REFUSED = frozenset(
    (
        *("as_custom_obj", "custom_obj", "token", "as_operator", "as_string_to_argument", "as_nested_tensors"),
        *("as_int_lists", "as_float_lists", "loss_output", "gradient_to_parameter", "gradient_to_user_input"),
    )
)


def identifier(name: Any) -> str:
    """`name`, if it may stand in Python source as the name of a value.

    Raises
    ------
    Malformed : anything else, or the name of something that such source uses.
    """
    if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name) or keyword.iskeyword(name) or name in _TAKEN:
        raise Malformed(f"names a value {str(name)[:60]!r}")
    return name


def path(name: Any) -> str:
    """`name`, if it may be that of a stored tensor or a module: printable, without quotes or backslashes.

    torch writes such a name between double quotes into the source that it compiles for a graph.
    """
    if not isinstance(name, str) or len(name) > TEXT or not name.isprintable() or set(name) & {'"', "\\"}:
        raise Malformed(f"names a tensor {str(name)[:60]!r}")
    if any(p == "" or keyword.iskeyword(p) or (p.startswith("__") and p.endswith("__")) for p in name.split(".")):
        raise Malformed(f"names a tensor {name[:60]!r}")
    return name


def read(content: bytes) -> schema.ExportedProgram:
    """The program that `content` describes, with formulas in place of their texts.

    Raises
    ------
    Malformed : anything that is not exactly what torch writes and slimline can use.
    """
    return _Builder(Expressions().parse).program(strictjson.parse(content))


def clean(content: bytes) -> bytes:
    """What `read` would read, written in one way only: the same program gives the same bytes."""
    from torch._export.serde.serialize import EnumEncoder, _dataclass_to_dict

    expressions = Expressions()
    program = _Builder(lambda text: text_of(expressions.parse(text))).program(strictjson.parse(content))
    plain = _dataclass_to_dict(program)  # type: ignore[no-untyped-call]
    return json.dumps(plain, cls=EnumEncoder, allow_nan=False).encode()


def weights(content: bytes) -> schema.PayloadConfig:
    """Which stored bytes are which tensors."""
    data = strictjson.parse(content)
    entries = data.get("config") if isinstance(data, dict) else None
    for entry in entries.values() if isinstance(entries, dict) else ():
        if isinstance(entry, dict) and entry.setdefault("use_pickle", False) is not False:
            raise Malformed("holds a pickle, which can run any code")
    config = _Builder(Expressions().parse).build(schema.PayloadConfig, data)
    assert isinstance(config, schema.PayloadConfig)
    return config


def structure(text: Any, keys: Callable[[Any], str] | None = None) -> str:
    """The JSON of a torch tree specification made of tuples, lists and dicts only.

    Parameters
    ----------
    keys : checks the keys of the first level's keyword arguments; any text by default.
    """
    if not isinstance(text, str):
        raise Malformed("holds no text where a structure is wanted")
    whole = strictjson.parse(text, 1 << 20)
    if not isinstance(whole, list) or len(whole) != 2 or type(whole[0]) is not int or whole[0] != 1:
        raise Malformed("holds an unknown kind of structure")
    _check_tree(whole[1], keys, 0)
    return json.dumps(whole)


def _check_tree(tree: Any, keys: Callable[[Any], str] | None, level: int) -> None:
    if not isinstance(tree, dict) or set(tree) != {"type", "context", "children_spec"}:
        raise Malformed("holds a structure that is not torch's")
    kind, context, children = tree["type"], tree["context"], tree["children_spec"]
    if not isinstance(children, list):
        raise Malformed("holds a structure that is not torch's")
    if kind is None and context is None and not children:
        return
    if not isinstance(kind, str) or kind not in _CONTAINERS:
        raise Malformed(f"is built of {str(kind)[:60]!r}: only tuples, lists and dicts are read")
    if kind == "builtins.dict":
        names = strictjson.parse(context, 1 << 20) if isinstance(context, str) else None
        plain = isinstance(names, list) and all(isinstance(n, (str, int)) for n in names)
        if not plain or len(set(names or ())) != len(children) or len(names or ()) != len(children):
            raise Malformed("holds a dict whose keys are not its parts'")
        if keys is not None and level == 1:
            for name in names or ():
                keys(name)
    elif context != _CONTAINERS[kind]:
        raise Malformed("holds a structure that is not torch's")
    for child in children:
        _check_tree(child, keys, level + 1)


class _Builder:
    """Builds objects of torch's schema; `formula` turns the text of a formula into what takes its place."""

    def __init__(self, formula: Callable[[str], Any]) -> None:
        self._formula = formula
        self._nodes = 0

    def program(self, data: Any) -> schema.ExportedProgram:
        """The whole program, its entry point alone, without what slimline leaves out."""
        program = self.build(schema.ExportedProgram, data)
        assert isinstance(program, schema.ExportedProgram)
        major = schema.SCHEMA_VERSION[0]
        if program.schema_version.major != major:
            raise Malformed(f"is of version {program.schema_version.major}, where this torch reads {major}")
        if not set(program.verifiers) <= {"ATEN", "TRAINING"}:
            raise Malformed(f"is in the dialect {str(program.verifiers)[:60]}")
        module = program.graph_module
        if not module.module_call_graph or module.module_call_graph[0].fqn or not module.module_call_graph[0].signature:
            raise Malformed("does not say how it is called")
        module.module_call_graph = module.module_call_graph[:1]
        module.metadata, module.treespec_namedtuple_fields, program.guards_code = {}, {}, []
        if not re.fullmatch(r"[\w.+<>=-]{1,64}", program.torch_version):
            raise Malformed("is of no version of torch")
        for name in program.range_constraints:
            if not SYMBOL.fullmatch(name):
                raise Malformed(f"bounds a size called {name[:60]!r}")
        return program

    def build(self, kind: Any, data: Any) -> Any:
        """`data` as an object of the type `kind`."""
        origin = typing.get_origin(kind)
        if origin is Annotated:
            return self.build(kind.__origin__, data)
        if origin in (typing.Union, types.UnionType):
            inner = next(k for k in typing.get_args(kind) if k is not type(None))
            return None if data is None else self.build(inner, data)
        if origin is list:
            return [self.build(typing.get_args(kind)[0], item) for item in _typed(list, data)]
        if origin is dict:
            inner = typing.get_args(kind)[1]
            return {_text(key): self.build(inner, value) for key, value in _typed(dict, data).items()}
        if kind is str:
            return _text(data)
        if kind is float:
            return _number(data)
        if issubclass(kind, enum.IntEnum):
            if _typed(int, data) not in {m.value for m in kind}:
                raise Malformed(f"holds an unknown {kind.__name__}")
            return data
        if kind in (int, bool):
            return _typed(kind, data)
        return self._union(kind, data) if issubclass(kind, _Union) else self._fields(kind, data)

    def _union(self, kind: Any, data: Any) -> Any:
        hints = _hints(kind)
        if len(_typed(dict, data)) != 1 or next(iter(data)) not in hints:
            raise Malformed(f"holds a {kind.__name__} of unknown kind")
        ((name, value),) = data.items()
        if name in _REFUSED:
            raise Malformed(f"holds {name}, which slimline does not read")
        built = self.build(hints[name], value)
        return kind.create(**{name: identifier(built) if name == "as_name" else built})

    def _fields(self, kind: Any, data: Any) -> Any:
        hints = _hints(kind)
        unknown = [str(key)[:60] for key in _typed(dict, data) if key not in hints]
        if unknown:
            raise Malformed(f"holds {unknown[0]!r} in a {kind.__name__}")
        built = {}
        for part in dataclasses.fields(kind):
            if part.name in data:
                built[part.name] = self._checked(kind.__name__, part.name, hints[part.name], data[part.name])
            elif part.default is dataclasses.MISSING and part.default_factory is dataclasses.MISSING:
                raise Malformed(f"lacks {part.name} in a {kind.__name__}")
        result = kind(**built)
        if kind is schema.Node:
            self._check_node(result)
        return result

    def _checked(self, owner: str, name: str, kind: Any, data: Any) -> Any:
        """A field, built and held against what it may say."""
        match owner, name:
            case ("ExportedProgram", "guards_code") | ("GraphModule", "metadata" | "treespec_namedtuple_fields"):
                return [] if name == "guards_code" else {}
            case "Node", "metadata":
                return _metadata(data)
            case "SymExpr", "expr_str":
                return self._formula(_text(data, 10_000))
            case "ModuleCallSignature", "in_spec":
                return structure(data, identifier)
            case "ModuleCallSignature", "out_spec":
                return _answers(data)
        built = self.build(kind, data)
        match owner, name:
            case (("TensorArgument" | "GraphArgument" | "InputToConstantInputSpec", "name")) | ("Node", "name"):
                if built is not None:
                    identifier(built)
            case "ModuleCallSignature", "forward_arg_names":
                for argument in built or ():
                    identifier(argument)
            case "NamedArgument", "name":
                if built and not _IDENTIFIER.fullmatch(built):
                    raise Malformed(f"names an argument {built[:60]!r}")
            case "Graph", "tensor_values" | "sym_int_values" | "sym_bool_values" | "sym_float_values":
                for value in built:
                    identifier(value)
            case "Graph", "custom_obj_values":
                if built:
                    raise Malformed("holds an object that is no tensor")
            case _, "parameter_name" | "buffer_name" | "tensor_constant_name":
                path(built)
            case "PayloadConfig", "config":
                for tensor in built:
                    path(tensor)
            case "Device", "type":
                if built != "cpu":
                    raise Malformed(f"is for the device {built[:60]!r}: export it on the cpu")
            case "TensorMeta", "layout":
                if built != schema.Layout.Strided:
                    raise Malformed("holds a sparse tensor: export it with dense weights")
            case "TensorMeta", "sizes":
                if len(built) > 32:
                    raise Malformed(f"holds a tensor of {len(built)} dimensions")
        return built

    def _check_node(self, node: schema.Node) -> None:
        self._nodes += 1
        if self._nodes > NODES:
            raise Malformed(f"has more than {NODES:,} operators")
        if not allowed.known(node.target):
            if node.target in allowed.FOREIGN:
                raise Malformed(f"calls {node.target!r}: import {allowed.FOREIGN[node.target]} before it is loaded")
            raise Malformed(f"calls {node.target[:80]!r}, which is none of the operators that slimline reads")
        block = node.target in allowed.BLOCKS
        for argument in node.inputs:
            if argument.arg.type == "as_graph" and not block:
                raise Malformed(f"hands a graph to {node.target[:80]!r}")
            if block and (argument.name or argument.kind != schema.ArgumentKind.POSITIONAL):
                raise Malformed(f"names an argument of {node.target[:80]!r}")
            if node.target.endswith(".pow") and node.target in allowed.SIZES:
                _check_power(node)


def _check_power(node: schema.Node) -> None:
    exponent = node.inputs[-1].arg
    if len(node.inputs) != 2 or exponent.type != "as_int" or not 0 <= exponent.as_int <= 8:
        raise Malformed("raises a size to a high power")


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, globalns=vars(schema))


def _typed(kind: type, data: Any) -> Any:
    if type(data) is not kind:
        raise Malformed(f"holds a {type(data).__name__} where a {kind.__name__} belongs")
    return data


def _text(data: Any, limit: int = TEXT) -> str:
    text = _typed(str, data)
    if len(text) > limit:
        raise Malformed(f"holds a text of {len(text):,} characters where {limit:,} are allowed")
    assert isinstance(text, str)
    return text


def _number(data: Any) -> float:
    if data in ("Infinity", "-Infinity", "NaN") and isinstance(data, str):
        return float(data)
    if type(data) not in (int, float):
        raise Malformed(f"holds a {type(data).__name__} where a number belongs")
    return float(data)


def _metadata(data: Any) -> dict[str, str]:
    """Of all that a node says of itself, only by which modules it was called."""
    text = _typed(dict, data).get("nn_module_stack")
    if not isinstance(text, str) or not text:
        return {}
    parts = [entry.split(",") for entry in text.split(";")]
    if any(len(p) != 3 or not all(_STACK_PART.fullmatch(x) for x in p) for p in parts):
        return {}  # a foreign module whose name holds a comma: its layers have no name then
    return {"nn_module_stack": stack([p[1] for p in parts])}


def stack(paths: list[str]) -> str:
    """Modules by which a node is called, outermost first, as torch writes it, but without class names."""
    return ";".join(f"L{i},{path},torch.nn.Module" for i, path in enumerate(paths))


def escaped(name: str) -> str:
    """The path of a module as it may stand in a stack, whose own signs are ``[](),;``."""
    return quote(name, safe=" @/:+*=<>!?&|~^{}#$")


def unescaped(name: str) -> str:
    """What `escaped` wrote."""
    return unquote(name)


def _answers(data: Any) -> str:
    """The structure of what a program answers; a class in it is unknown here, and becomes a tuple of all tensors."""
    text = _typed(str, data)
    try:
        return structure(text)
    except Malformed:
        leaves = _leaves(strictjson.parse(text, 1 << 20))
        leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
        return json.dumps([1, {"type": "builtins.tuple", "context": "null", "children_spec": [leaf] * leaves}])


def _leaves(whole: Any) -> int:
    def count(tree: Any) -> int:
        if not isinstance(tree, dict) or not isinstance(tree.get("children_spec"), list):
            raise Malformed("holds a structure that is not torch's")
        if tree.get("type") is None:
            return 1
        return sum(map(count, tree["children_spec"]))

    if not isinstance(whole, list) or len(whole) != 2:
        raise Malformed("holds an unknown kind of structure")
    return count(whole[1])
