"""Weights in short formats, activations in float: how an ONNX file stores them.

A rounding operator marks such a weight on its way from a framework, `pack` puts its codes in its place. The weight of a
linear layer on an integer grid becomes DequantizeLinear in the one layout that ONNX Runtime fuses into MatMulNBits:
``(inputs, outputs)``, blocks along the inputs. All else becomes Cast and Mul, which runtimes compute once, when they
load the file; a DequantizeLinear that is not fused would run each time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from slimline.basics.errors import SlimlineError
from slimline.methods.formats import Array, BlockFloat, FloatFormat, Format, IntegerGrid, Levels, Scaled
from slimline.runtimes.forms.onnx_dynamic import dynamic_source, integer_product
from slimline.runtimes.forms.onnx_formats import FLOATS, coded, is_fused
from slimline.runtimes.forms.onnx_graph import DOMAIN, FAKE_QUANTIZE, MARK, attribute, replace
from slimline.runtimes.forms.onnx_tables import decode_rows, is_lookup

_FUNCTIONS = frozenset({
    "Relu", "LeakyRelu", "Elu", "Selu", "Sigmoid", "HardSigmoid", "Tanh", "Softplus", "Softsign", "ThresholdedRelu",
})  # fmt: skip
_OPSETS = {"float16": 13, "bfloat16": 13, "float8_e4m3fn": 19, "float8_e5m2": 19}
INT4_OPSET = 21


def pack(model: ir.Model, weights: Mapping[str, Format], ragged: bool = True, explicit: bool = False) -> None:
    """Store the codes of marked weights, in place.

    Parameters
    ----------
    weights : formats by the names of the model's stored tensors.
    ragged : whether the last block of a DequantizeLinear may be shorter than the others.
    explicit : whether every weight with scales becomes one DequantizeLinear and nothing else.

    Raises
    ------
    SlimlineError : a weight that the graph does not hold, or an opset that cannot be raised.
    """
    missing = set(weights)
    for node, name in list(_marked(model.graph)):
        if name in weights:
            _Packer(model.graph, node, weights[name], ragged, explicit).run()
            missing.discard(name)
    if missing:
        raise SlimlineError(
            f"The exported graph does not read the weight {min(missing)}, so its codes cannot be stored: "
            "leave its layer out by keep."
        )


def unmark(graph: ir.Graph, weights: Collection[str]) -> None:
    """Take out the marks of weights, in place: for runtimes that find them otherwise."""
    for node, name in list(_marked(graph)):
        if name in weights:
            replace(graph, node, [], node.inputs[0])


def upgrade(model: ir.Model, weights: Mapping[str, Format]) -> None:
    """Raise the opset to the first that has the types of `weights`, in place."""
    raise_opset(model, max((_opset(each) for each in weights.values()), default=0))


def raise_opset(model: ir.Model, least: int) -> None:
    """Raise the opset to `least`, in place.

    Raises
    ------
    SlimlineError : there is an operator that cannot be raised.
    """
    if model.opset_imports[""] >= least:
        return
    from onnxscript import version_converter

    own = model.opset_imports.pop(DOMAIN, None)
    version_converter.convert_version(model, least)
    if own is not None:
        model.opset_imports[DOMAIN] = own
    if model.opset_imports[""] < least:
        raise SlimlineError(
            f"The model is of ONNX opset {model.opset_imports['']}, which has no numbers of so few bits, and cannot be "
            f"raised to {least}: export it anew with opset {least}, or choose the dtype int8."
        )


def _opset(each: Format) -> int:
    return _OPSETS.get(each.dtype, INT4_OPSET) if isinstance(each, FloatFormat) else INT4_OPSET


def _marked(graph: ir.Graph) -> Iterator[tuple[ir.Node, str]]:
    for node in graph:
        if node.op_type == FAKE_QUANTIZE and (value := node.inputs[0]) is not None and value.is_initializer():
            yield node, str(value.metadata_props.get(MARK, value.name))


@dataclass
class _Packer:
    """Puts codes in the place of one marked weight."""

    graph: ir.Graph
    node: ir.Node
    format: Format
    ragged: bool
    explicit: bool

    def __post_init__(self) -> None:
        value = self.node.inputs[0]
        assert value is not None and value.const_value is not None
        self.name, self.weight = str(value.name), np.asarray(value.const_value.numpy())
        self.format = coded(self.format)
        self.codes = self.format.encode(self.weight)

    def run(self) -> None:
        """Do it."""
        each = self.format
        if self.explicit and isinstance(each, Scaled) and not (isinstance(each, FloatFormat) and each.is_plain):
            self._sole(each)
            return
        assert isinstance(each, Scaled)
        product = self._product(each) if isinstance(each, IntegerGrid) else None
        codes = _typed(self.codes, each)
        table = decode_rows(
            self.graph, self.node, each, codes, lambda array: self._stored(array, "rows"), alone=product is None
        )
        if product is not None:
            assert isinstance(each, IntegerGrid)
            self._multiplied(each, *product, table)
        _remove_unread(self.graph, self.node)
        if self.node.graph is not None:
            self._unpacked(each)

    def _product(self, each: IntegerGrid) -> tuple[ir.Node, bool] | None:
        """The one product with the matrix and whether it takes it transposed, if only lookups of rows read it besides
        and it can take the codes. Of several products ONNX Runtime fuses none with codes that they share."""
        products: list[tuple[ir.Node, bool]] = []
        pending = [(*use, False) for use in self.node.outputs[0].uses()]
        if self.weight.ndim != 2 or self.node.outputs[0].is_graph_output():
            return None
        while pending:
            reader, index, turned = pending.pop()
            if reader.op_type == "Transpose" and not reader.outputs[0].is_graph_output():
                pending += [(*use, not turned) for use in reader.outputs[0].uses()]
            elif index == 1 and _is_product(reader):
                products.append((reader, turned ^ (reader.op_type == "Gemm" and bool(attribute(reader, "transB", 0)))))
            elif turned or index or not is_lookup(reader):
                return None
        if len(products) != 1 or not (self._is_integer(each, *products[0]) or self._is_fused(each, products[0][1])):
            return None
        return products[0]

    def _is_integer(self, each: IntegerGrid, reader: ir.Node, turned: bool) -> bool:
        """Whether what it multiplies by the matrix is rounded too."""
        return dynamic_source(reader.inputs[0]) is not None and each.axis == (0 if turned else 1)

    def _is_fused(self, each: IntegerGrid, turned: bool) -> bool:
        along = 1 if turned else 0
        block = each.blocks[along] if len(each.blocks) == 2 else None
        return is_fused(each, turned) and (block is None or self.weight.shape[along] % block == 0 or self.ragged)

    def _multiplied(self, each: IntegerGrid, reader: ir.Node, turned: bool, table: ir.Value | None) -> None:
        rounded = dynamic_source(reader.inputs[0])
        if rounded is not None and self._is_integer(each, reader, turned):
            self._integer(each, reader, turned, rounded)
        else:
            self._dequantized(each, reader, turned, table)

    def _sole(self, each: Scaled) -> None:
        """One DequantizeLinear in its place, in the order in which a linear layer multiplies by it."""
        reader = _sole_reader(self.node.outputs[0])
        turned = reader is not None and reader.op_type == "Transpose" and self.weight.ndim == 2
        end = reader if turned and reader is not None else self.node
        blocks = each.blocks[::-1] if turned else each.blocks
        codes, scale = (np.ascontiguousarray(x.T) if turned else x for x in (self.codes, each.scale))
        long = [d for d, block in enumerate(blocks) if block is not None and block > 1 and scale.shape[d] > 1]
        divided = [d for d, n in enumerate(scale.shape) if n > 1]
        attributes: dict[str, int] = {}
        if long:
            block, size = blocks[long[0]], codes.shape[long[0]]
            assert block is not None
            if size % block:
                raise SlimlineError(
                    f"The weight {self.name} has {size} inputs, which {block} in a group do not divide: choose another "
                    "group_size for its layer, or leave it out by keep."
                )
            attributes = {"axis": long[0], "block_size": block}
        elif divided:
            attributes, scale = {"axis": divided[0]}, scale.reshape(-1)
        else:
            scale = scale.reshape(())
        stored = [self._stored(_typed(codes, each), "codes"), self._stored(np.ascontiguousarray(scale), "scale")]
        real = ir.node("DequantizeLinear", stored, attributes, name="")
        if end is not self.node:
            replace(self.graph, self.node, [], self.node.inputs[0])
        replace(self.graph, end, [real])

    def _integer(self, each: IntegerGrid, reader: ir.Node, turned: bool, rounded: ir.Node) -> None:
        """A product of integers, since what it reads is rounded as well."""
        codes = self._stored(np.ascontiguousarray(_integers(self.codes.T if turned else self.codes, each)), "codes")
        bias = reader.inputs[2] if len(reader.inputs) > 2 else None
        nodes = integer_product(reader, rounded, codes, self._stored(each.scale.reshape(-1), "scale"), bias)
        replace(self.graph, reader, nodes)

    def _dequantized(self, each: IntegerGrid, reader: ir.Node, turned: bool, table: ir.Value | None) -> None:
        """One DequantizeLinear in front of the product, and a Transpose where the codes are those of a `table` as well:
        ONNX Runtime turns them when it loads the file, which does not hold them twice."""
        block = each.blocks[1 if turned else 0]
        if not turned or block is not None:
            table = None

        def laid(array: Array) -> Array:
            return np.ascontiguousarray(array.T if turned else array)

        attributes = {"axis": 1 if table is None else 0} if block is None else {"axis": 0, "block_size": block}
        ends = [laid(each.scale)] if each.zero_point is None else [laid(each.scale), laid(each.zero_point)]
        if block is None:
            ends = [end.reshape(-1) for end in ends]
        zero = [self._stored(_integers(end, each), "zero") for end in ends[1:]]
        codes = self._stored(_integers(laid(self.codes), each), "codes") if table is None else table
        inputs = [codes, self._stored(ends[0], "scale"), *zero]
        nodes = [ir.node("DequantizeLinear", inputs, attributes, name="")]
        if table is not None:
            nodes.append(ir.node("Transpose", nodes[0].outputs, {"perm": [1, 0]}, name=""))
        self.graph.insert_before(reader, nodes)
        real = nodes[-1]
        product = reader
        if reader.op_type == "MatMul":
            reader.replace_input_with(1, real.outputs[0])
        else:
            product = ir.node("MatMul", [reader.inputs[0], real.outputs[0]], name=reader.name)
            nodes = [product]
            if len(reader.inputs) > 2 and reader.inputs[2] is not None:
                nodes.append(ir.node("Add", [product.outputs[0], reader.inputs[2]], name=f"{reader.name}/Add"))
            replace(self.graph, reader, nodes)
        self._part_from_function(product)

    def _part_from_function(self, product: ir.Node) -> None:
        """Subtract the negative bias where a function follows: of a product, a sum and a function ONNX Runtime would
        make one operator, and then fuse nothing with the weight."""
        total = _sole_reader(product.outputs[0])
        if total is None or total.op_type != "Add":
            return
        after, (one, other) = _sole_reader(total.outputs[0]), total.inputs
        bias = other if one is product.outputs[0] else one
        if after is None or after.op_type not in _FUNCTIONS or bias is None or bias.const_value is None:
            return
        negative = self._stored(-bias.const_value.numpy(), "bias")
        replace(self.graph, total, [ir.node("Sub", [product.outputs[0], negative], name=total.name)])

    def _unpacked(self, each: Scaled) -> None:
        """Cast, and where there are scales Sub and Mul block by block: no more than constants to a runtime."""
        shape = self.weight.shape
        lengths = [_length(n, block) for n, block in zip(shape, each.blocks or (None,) * len(shape), strict=True)]
        counts = [-(-n // length) for n, length in zip(shape, lengths, strict=True)]
        padded = [(0, count * length - n) for n, count, length in zip(shape, counts, lengths, strict=True)]
        split = [size for pair in zip(counts, lengths, strict=True) for size in pair if size != 1] or [1]
        lying = [size for pair in zip(counts, lengths, strict=True) for size in _lying(*pair)] or [1]
        typed = _typed(np.pad(self.codes, padded).reshape(split), each)
        table = _table(each)
        codes, kind = self._stored(typed, "codes"), ir.DataType.FLOAT if table is None else ir.DataType.INT32
        nodes = [ir.node("Cast", [codes], {"to": kind}, name="")]
        if table is not None:
            nodes.append(ir.node("Gather", [self._stored(table, "levels"), nodes[0].outputs[0]], name=""))
        if isinstance(each, IntegerGrid) and each.zero_point is not None:
            zero = self._stored(_integers(each.zero_point.reshape(lying), each), "zero")
            nodes.append(ir.node("Cast", [zero], {"to": ir.DataType.FLOAT}, name=""))
            nodes.append(ir.node("Sub", [nodes[-2].outputs[0], nodes[-1].outputs[0]], name=""))
        if isinstance(each, BlockFloat):
            real = nodes[-1].outputs[0]
            nodes += self._short_scales(each, lying)
            nodes.append(ir.node("Mul", [real, nodes[-1].outputs[0]], name=""))
        elif not (isinstance(each, FloatFormat) and each.is_plain):
            scale = self._stored(each.scale.reshape(lying), "scale")
            nodes.append(ir.node("Mul", [nodes[-1].outputs[0], scale], name=""))
        if (whole := [n + more for n, (_, more) in zip(shape, padded, strict=True)]) != split:
            sizes = self._stored(np.array(whole, np.int64), "shape")
            nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], sizes], name=""))
        if whole != list(shape):
            ends = [self._stored(np.array(x, np.int64), "ends") for x in ([0] * len(shape), shape)]
            nodes.append(ir.node("Slice", [nodes[-1].outputs[0], *ends], name=""))
        replace(self.graph, self.node, nodes)

    def _short_scales(self, each: BlockFloat, shape: Sequence[int]) -> list[ir.Node]:
        """Scales of a short type; powers of two as bfloat16, since runtimes read no float8_e8m0."""
        kind = FLOATS.get(each.scales, ml_dtypes.bfloat16)
        scale = self._stored(each.multiples.reshape(shape).astype(kind), "scale")
        nodes = [ir.node("Cast", [scale], {"to": ir.DataType.FLOAT}, name="")]
        if each.unit != 1:
            nodes.append(ir.node("Mul", [nodes[0].outputs[0], self._stored(each.unit, "unit")], name=""))
        return nodes

    def _stored(self, array: Array, what: str) -> ir.Value:
        name = f"{self.name}_{what}_{self.node.name}"
        while name in self.graph.initializers:
            name += "_"
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value


def _sole_reader(value: ir.Value) -> ir.Node | None:
    readers = list(value.uses())
    return readers[0][0] if len(readers) == 1 and not value.is_graph_output() else None


def _is_product(node: ir.Node) -> bool:
    """Whether it is the product of its first two inputs and nothing else but a sum with the third."""
    if node.op_type == "Gemm":
        plain = all(attribute(node, name, 1.0) == 1.0 for name in ("alpha", "beta"))
        return plain and not attribute(node, "transA", 0)
    return node.op_type == "MatMul"


def _remove_unread(graph: ir.Graph, node: ir.Node) -> None:
    """Take out a mark, and transpositions of it, that nothing reads any more."""
    if node.graph is None:
        return
    for reader, _ in list(node.outputs[0].uses()):
        if reader.op_type == "Transpose":
            _remove_unread(graph, reader)
    if not list(node.outputs[0].uses()) and not node.outputs[0].is_graph_output():
        graph.remove(node, safe=True)


def _length(n: int, block: int | None) -> int:
    return n if block is None else min(block, n)


def _lying(count: int, length: int) -> Iterator[int]:
    """Of the sizes `count` and `length` of one dimension, those that scales have, without what `split` leaves out."""
    if count != 1:
        yield count
    if length != 1:
        yield 1


def _integers(array: Array, each: IntegerGrid) -> Array:
    """Codes in the type that the file has."""
    if each.bits <= 4:
        return array.astype(ml_dtypes.int4 if each.signed else ml_dtypes.uint4)
    return array.astype(np.int8 if each.signed else np.uint8)


def _table(each: Scaled) -> Array | None:
    """The numbers that codes stand for where the file holds them, since runtimes do not read the type itself."""
    if isinstance(each, BlockFloat):
        return each.unscaled.decode(np.arange(1 << each.code_bits))
    return each.codebook if isinstance(each, Levels) else None


def _typed(codes: Array, each: Scaled) -> Array:
    if isinstance(each, BlockFloat):
        return codes.astype(ml_dtypes.uint4)
    if isinstance(each, IntegerGrid):
        return _integers(codes, each)
    if isinstance(each, Levels):
        return codes
    assert isinstance(each, FloatFormat)
    return codes.view(FLOATS[each.dtype])
