"""Rules of the operators that look at neighbours or at whole dimensions: pooling, resizing, scans, spectra, patches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from slimline.frameworks.torch.call import Call
from slimline.frameworks.torch.registry import RULES, each, rule, unknown, whole
from slimline.graph.equation import parse


def _last(count: int) -> Callable[[Call], Sequence[int]]:
    return lambda call: range(call.rank - count, call.rank)


def _windows(count: int) -> Callable[[Call], Sequence[int]]:
    """The last dimensions, but those of which a window sees one position at a time."""

    def moved(call: Call) -> Sequence[int]:
        kernel = each(call["kernel_size"], count)
        stride, padding = each(call["stride"] or list(kernel), count), each(call["padding"], count)
        alone = [w == (1, 1, 0) for w in zip(kernel, stride, padding, strict=True)]
        return [call.rank - count + d for d in range(count) if not alone[d]]

    return moved


for _n in (1, 2, 3):
    RULES |= {f"aten.max_pool{_n}d{suffix}": whole("max", _windows(_n)) for suffix in ("", "_with_indices")}
    RULES[f"aten.avg_pool{_n}d"] = whole("mean", _windows(_n))
    RULES[f"aten.adaptive_max_pool{_n}d"] = whole("max", _last(_n))
    RULES[f"aten.adaptive_avg_pool{_n}d"] = whole("mean", _last(_n))
    RULES[f"aten.max_unpool{_n}d"] = whole("other", _last(_n), inputs=2)
for _n, _names in {
    1: "upsample_linear1d upsample_nearest1d _upsample_nearest_exact1d",
    2: "upsample_bilinear2d upsample_nearest2d _upsample_nearest_exact2d upsample_bicubic2d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa _upsample_lanczos2d_aa",
    3: "upsample_trilinear3d upsample_nearest3d _upsample_nearest_exact3d",
}.items():
    RULES |= {f"aten.{name}": whole("resize", _last(_n)) for name in _names.split()}
RULES |= {f"aten.{name}": whole("other", _last(2)) for name in ("tril", "triu")}
RULES |= {f"aten.{name}": whole("other", lambda call: [call.axis()]) for name in ("cumsum", "cumprod")}
RULES["aten.roll"] = whole("other", lambda call: call.axes("dims"))
RULES["aten.flip"] = whole("other", lambda call: call.axes("dims"))
for _name in ("fft", "rfft", "hfft"):
    for _way in (_name, f"i{_name}"):
        RULES[f"aten.fft_{_way}"] = whole("other", lambda call: [call.axis()])
        RULES |= {f"aten.fft_{_way}{n}": whole("other", lambda call: call.axes()) for n in ("2", "n")}
RULES |= {f"aten.fft_{name}": whole("other", lambda call: call.axes()) for name in ("fftshift", "ifftshift")}


@rule("view_as_complex", "view_as_real")
def _pairs(call: Call) -> None:
    """The last dimension of the real tensor holds a real and an imaginary part."""
    axes = " ".join(f"a{d}" for d in range(min(call.rank, len(call.output))))
    text = f"{axes} . -> {axes}" if call.target == "aten.view_as_complex" else f"{axes} -> {axes} ."
    call.emit("reshape", call.tensors()[:1], {"equation": parse(text)})


@rule("grid_sampler", "grid_sampler_2d")
def _grid_sampler(call: Call) -> None:
    dots = " ".join("." * (call.rank - 2))
    equation = parse(f"b c {dots}, b {dots} . -> b c {dots}")
    call.emit("pool", call.tensors("input", "grid"), {"equation": equation, "function": "resize"})


@rule("im2col", "col2im")
def _patches(call: Call) -> None:
    """Patches of an image and back: channels and the places in a patch share a dimension."""
    apart = call.target == "aten.im2col"
    if call.rank != (4 if apart else 3):
        return unknown(call, "an input without a batch dimension")
    text = "b c . . -> b (c k) ." if apart else "b (c k) . -> b c . ."
    fixed = {"k": "the places of a patch"}
    equation = parse(text, {"k": math.prod(each(call["kernel_size"], 2))}, fixed=fixed)
    return call.emit("pool", call.tensors()[:1], {"equation": equation, "function": "other"})


@rule("unfold")
def _sliding(call: Call) -> None:
    axis = call.axis("dimension")
    x = " ".join("." if d == axis else f"a{d}" for d in range(call.rank))
    call.emit("pool", call.tensors()[:1], {"equation": parse(f"{x} -> {x} ."), "function": "other"})
