"""torchvision's zoo with random weights: is each model pruned exactly?

    python benchmarks/zoo_torchvision.py [NAME …]

Needs an environment with torchvision beside slimline; nothing is downloaded. Inputs are the smallest a model takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zoo import Case, main

WINDOWED = {"vit_": {"image_size": 64}, "maxvit_t": {"input_size": (224, 224)}}
SIDES = {"inception_v3": 96, "alexnet": 80, "googlenet": 64, "maxvit_t": 224}
LARGE = "640 million parameters: the check holds seven copies of them, more than this machine has memory for"
SKIPPED = dict.fromkeys(("vit_h_14", "regnet_y_128gf"), LARGE)


def _arguments(name: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {"weights": None}
    for start, more in WINDOWED.items():
        if name.startswith(start):
            arguments |= more
    if name in ("googlenet", "inception_v3"):
        arguments |= {"init_weights": False, "aux_logits": True}
    if _group(name) in ("segmentation", "detection"):
        arguments["weights_backbone"] = None
    if "rcnn" in name:
        arguments |= {"rpn_post_nms_top_n_test": 40, "box_score_thresh": 0.0, "box_detections_per_img": 8}
    if _group(name) == "detection" and not name.startswith("ssd"):
        arguments |= {"min_size": 96, "max_size": 128}
    return arguments


def _group(name: str) -> str:
    from torchvision import models

    return models.get_model_builder(name).__module__.removeprefix("torchvision.models.").partition(".")[0]


def _inputs(name: str) -> tuple[Any, ...]:
    import torch

    group = _group(name)
    if group == "optical_flow":
        return tuple(torch.randn(2, 3, 128, 128) for _ in range(2))
    if group == "video":
        frames, side = {"mvi": (16, 224), "s3d": (16, 224), "swi": (8, 64)}.get(name[:3], (4, 32))
        return (torch.randn(2, 3, frames, side, side),)
    if group == "segmentation":
        return (torch.randn(2, 3, 64, 64),)
    if group == "detection":
        return ([torch.rand(3, 96, 128), torch.rand(3, 128, 112)],)
    return (torch.randn(2, 3, SIDES.get(name, 64), SIDES.get(name, 64)),)


def _parts(name: str) -> tuple[str, ...]:
    """Of a detector: what lies between its decisions about boxes."""
    heads = {"fasterrcnn": (), "maskrcnn": ("roi_heads.mask_head",), "keypointrcnn": ("roi_heads.keypoint_head",)}
    family = name.partition("_")[0]
    if family in heads:
        return ("backbone", "rpn.head", "roi_heads.box_head", *heads[family])
    return ("backbone", "head") if _group(name) == "detection" else ()


def _targets() -> list[dict[str, Any]]:
    """What a detector trains towards: two boxes an image, with masks and keypoints for those that want them."""
    import torch

    boxes = torch.tensor([[8.0, 10.0, 60.0, 70.0], [30.0, 20.0, 90.0, 88.0]])
    sizes = ((96, 128), (128, 112))
    points = torch.cat([torch.rand(2, 17, 2) * 50 + 20, torch.ones(2, 17, 1)], 2)
    return [
        {
            "boxes": boxes, "labels": torch.ones(2, dtype=torch.long), "keypoints": points,
            "masks": torch.ones(2, h, w, dtype=torch.uint8),
        }
        for h, w in sizes
    ]  # fmt: skip


def case(name: str) -> Case:
    """A model of `torchvision.models`."""

    def make() -> tuple[Any, tuple[Any, ...]]:
        from torchvision import models

        return models.get_model(name, **_arguments(name)), _inputs(name)

    return Case(make, _parts(name), _targets if _parts(name) else None)


def cases() -> dict[str, Case]:
    """Every model of the sweep: classification, segmentation, video, optical flow, then detection."""
    from torchvision import models

    order = ("classification", "segmentation", "video", "optical_flow", "detection")
    names = [n for n in models.list_models() if not n.startswith("quantized_") and n not in SKIPPED]
    by_name = {}
    for group in order:
        for name in names:
            if (_group(name) if _group(name) in order else "classification") == group:
                by_name[name] = case(name)
    return by_name


def small_first(names: Iterable[str]) -> list[str]:
    """The smallest of every family, then their larger sisters, so that what a family cannot do shows early."""
    from torchvision import models

    def size(name: str) -> int:
        return min(int(w.meta["num_params"]) for w in models.get_model_weights(name))

    families: dict[str, list[str]] = {}
    for name in sorted(names, key=size):
        families.setdefault(models.get_model_builder(name).__module__, []).append(name)
    rounds = {name: (k, size(name)) for family in families.values() for k, name in enumerate(family)}
    return sorted(rounds, key=lambda name: rounds[name])


if __name__ == "__main__":
    main("torchvision", cases(), SKIPPED, __doc__, order=small_first)
