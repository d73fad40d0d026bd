"""Small transformers: of images, and of text."""

from __future__ import annotations

from slimline.basics.errors import SlimlineError
from slimline.zoo.architectures.scaling import count, divisible, image, multiplier
from slimline.zoo.blocks import (
    Activation,
    Architecture,
    Attention,
    ClassToken,
    Conv,
    Dropout,
    Embedding,
    First,
    Identity,
    LayerNorm,
    Linear,
    Places,
    Positions,
    Serial,
    Tokens,
    numbered,
    residual,
    serial,
)


def vit(
    width: float = 1.0,
    resolution: float = 1.0,
    classes: int = 1000,
    in_channels: int = 3,
    depth: int = 12,
    heads: int = 3,
    patch: int = 16,
) -> Architecture:
    """ViT-Ti/16 (Touvron et al., 2021, arXiv:2012.12877): 5.7 million parameters.

    Parameters
    ----------
    width : by which 192 is multiplied, to a multiple of 8 in each head.
    resolution, classes, in_channels : those of `mobilenet_v1`; the size is a multiple of `patch`.
    depth : blocks.
    heads : of each attention.
    patch : height and width of the parts of an image that become vectors.

    Raises
    ------
    SlimlineError : a setting that is no such number, or a size that patches do not fill.
    """
    source = image(resolution, in_channels)
    if source.size % count("patch", patch):
        raise SlimlineError(
            f"Patches of {patch} do not fill images of {source.size} × {source.size}: give a resolution and a patch "
            "so that they do."
        )
    columns = divisible(192 * multiplier("width", width), 8 * count("heads", heads))
    network = serial(
        patches=Conv(in_channels, columns, patch, patch, bias=True, padding=0),
        places=Places(),
        token=ClassToken(columns),
        positions=Positions((source.size // patch) ** 2 + 1, columns),
        blocks=numbered(_pre_norm(columns, heads) for _ in range(count("depth", depth))),
        norm=LayerNorm(columns),
        first=First(),
        head=Linear(columns, count("classes", classes)),
    )
    return Architecture("vit", source, network)


def tinybert(
    width: float = 1.0,
    classes: int = 2,
    depth: int = 4,
    heads: int = 12,
    length: int = 128,
    vocabulary: int = 30522,
) -> Architecture:
    """An encoder of text of the size of TinyBERT-4 (Jiao et al., 2020, arXiv:1909.10351): 14 million parameters.

    It has no embeddings of segments, which a single text does not need.

    Parameters
    ----------
    width : by which 312, and 1200 inside, are multiplied; to a multiple of 2 in each head.
    classes : width of the output.
    depth : blocks.
    heads : of each attention.
    length : tokens of a sample, padded ones too.
    vocabulary : different tokens.

    Raises
    ------
    SlimlineError : a setting that is no such number.
    """
    scale = multiplier("width", width)
    columns, inside = divisible(312 * scale, 2 * count("heads", heads)), divisible(1200 * scale)
    source = Tokens(count("length", length), count("vocabulary", vocabulary))
    network = serial(
        words=Embedding(source.vocabulary, columns),
        positions=Positions(source.length, columns),
        norm=LayerNorm(columns, 1e-12),
        blocks=numbered(_post_norm(columns, inside, heads) for _ in range(count("depth", depth))),
        first=First(),
        pooler=Linear(columns, columns),
        activation=Activation("tanh"),
        dropout=Dropout(0.1),
        head=Linear(columns, count("classes", classes)),
    )
    return Architecture("tinybert", source, network)


def _mlp(width: int, inside: int) -> dict[str, Linear | Activation]:
    return {"expand": Linear(width, inside), "activation": Activation("gelu"), "project": Linear(inside, width)}


def _pre_norm(width: int, heads: int) -> Serial:
    attention = serial(norm=LayerNorm(width), heads=Attention(width, heads))
    mlp = serial(norm=LayerNorm(width), **_mlp(width, 4 * width))
    return serial(attention=residual(attention, Identity()), mlp=residual(mlp, Identity()))


def _post_norm(width: int, inside: int, heads: int) -> Serial:
    return serial(
        attention=residual(Attention(width, heads), Identity()),
        attention_norm=LayerNorm(width, 1e-12),
        mlp=residual(serial(**_mlp(width, inside)), Identity()),
        mlp_norm=LayerNorm(width, 1e-12),
    )
