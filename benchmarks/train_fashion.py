"""Train the Fashion-MNIST networks of the benchmarks.

    python benchmarks/train_fashion.py [resnet | vit]

writes ``benchmarks/weights/fashion_resnet.safetensors`` (32-64-128, two blocks a stage, 70 M MACs; float32, 2.8 MB) or
``fashion_vit.safetensors`` (six blocks of width 96, patches of 7 × 7; 2.7 MB, as the fifth of ``--epochs 6`` left it).
The ResNet takes half an hour on two cores with AMX (bfloat16 autocast), a few hours without; an epoch of the ViT two
minutes on one. The 10,000 test images are looked at once, at the end, to print the accuracy; nothing is selected by
them.
"""

from __future__ import annotations

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from slimline.zoo.torch import ResidualCNN, vit

WEIGHTS = Path(__file__).parent / "weights"
FOLDER = Path("/usr/share/datasets/fashion-mnist")


def read_idx(path: Path) -> np.ndarray:
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = np.frombuffer(raw, ">i4", dims, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror half of the images and shift each by up to two pixels."""
    n, _, h, w = x.shape
    flip = torch.rand(n, generator=generator) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    x = F.pad(x, (2, 2, 2, 2))
    dy, dx = torch.randint(0, 5, (2, n), generator=generator)
    rows = (dy[:, None] + torch.arange(h))[:, None, :, None]
    cols = (dx[:, None] + torch.arange(w))[:, None, None, :]
    return x[torch.arange(n)[:, None, None, None], 0, rows, cols]


def fashion_vit() -> torch.nn.Module:
    """With random weights: six blocks of width 96 with three heads, 17 tokens of an image."""
    return vit(width=0.5, resolution=0.125, classes=10, in_channels=1, depth=6, heads=3, patch=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="?", choices=("resnet", "vit"), default="resnet")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    output: Path = args.output or WEIGHTS / f"fashion_{args.network}.safetensors"
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    x = torch.tensor(read_idx(FOLDER / "train-images-idx3-ubyte.gz")).float()[:, None] / 255
    y = torch.tensor(read_idx(FOLDER / "train-labels-idx1-ubyte.gz")).long()
    xt = torch.tensor(read_idx(FOLDER / "t10k-images-idx3-ubyte.gz")).float()[:, None] / 255
    yt = torch.tensor(read_idx(FOLDER / "t10k-labels-idx1-ubyte.gz")).long()
    model = (ResidualCNN() if args.network == "resnet" else fashion_vit()).to(memory_format=torch.channels_last)
    batch = 256
    steps = args.epochs * (len(x) // batch)
    optimizer: torch.optim.Optimizer
    if args.network == "resnet":
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        highest = 0.2
    else:
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        highest = 2e-3
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, total_steps=steps, pct_start=0.2)
    start = time.time()
    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        order = torch.randperm(len(x), generator=generator)
        for i in range(len(x) // batch):
            pick = order[i * batch : (i + 1) * batch]
            images = augment(x[pick], generator).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.network == "resnet"):  # convolutions gain
                loss = F.cross_entropy(model(images), y[pick])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(
            f"epoch {epoch + 1}/{args.epochs} loss {total / (len(x) // batch):.4f} {time.time() - start:.0f} s",
            flush=True,
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, output)
    model.eval()
    with torch.no_grad():
        predicted = torch.cat([model(part).argmax(1) for part in xt.split(500)])
    print(f"test accuracy {(predicted == yt).float().mean():.4f}")


if __name__ == "__main__":
    main()
