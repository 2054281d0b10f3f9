"""Measures encoders for small photographs, and packs the trained ``tiny/vit`` with its card.

    python benchmarks/tiny_encoder.py measure tiny/vit tiny/vit@random pixels --data FOLDER --out numbers.json
    python benchmarks/tiny_encoder.py pictures tiny/vit tiny/vit@random --data FOLDER --out patches.png
    python benchmarks/tiny_encoder.py pack RUN --out tiny-vit.safetensors

FOLDER holds training and validation files with labels, such as Tiny ImageNet as Parquet.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import underpaint
from underpaint.data.loader import ImagePass
from underpaint.data.order import Order
from underpaint.data.sources import guess_dataset, open_dataset
from underpaint.data.transforms import Crop, to_tensor
from underpaint.evaluation.probe import linear_probe, nearest_neighbours
from underpaint.report.pca import latent_pca
from underpaint.report.pictures import contact_sheet, enlarge


def load_images(data: str, size: int, train: int, validation: int, workers: int) -> dict[str, Tensor]:
    """Read a fixed draw of both parts: uint8 images and labels."""
    guessed = guess_dataset(data)
    assert guessed.validation is not None, "the folder needs a validation split"
    result = {}
    for part, config, count in (("train", guessed.train, train), ("validation", guessed.validation, validation)):
        dataset = open_dataset(config)
        rows = np.sort(Order(len(dataset), 0).indices(np.arange(min(count, len(dataset)))))
        found = list(ImagePass(dataset, transform=Crop(size, size), batch=512, indices=rows, workers=workers))
        result[part] = torch.cat([batch.images for batch in found])
        result[f"{part}_labels"] = torch.cat([batch.labels for batch in found if batch.labels is not None])
    return result


@torch.inference_mode()
def features(name: str, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the pooled features of images, and the patch features of the last map for the first 4,000."""
    if name == "pixels":
        pixels = torch.cat([to_tensor(part).flatten(1) for part in F_pool(images)])
        return pixels.to(device), pixels.to(device).view(-1, 3, 8, 8)[:4000]
    encoder = underpaint.create("encoder", name).to(device).eval()
    pooled, maps = [], []
    for part in images.split(500):
        with torch.autocast(device.type, torch.bfloat16):
            found = encoder(to_tensor(part.to(device)))
        assert found.pooled is not None
        pooled.append(found.pooled.float())
        if len(maps) < 8:
            maps.append(found.maps[-1].float())
    return torch.cat(pooled), torch.cat(maps)


def F_pool(images: Tensor) -> list[Tensor]:  # noqa: N802 - pooling of uint8 images
    """Return 8×8 means of the images, as uint8."""
    parts = []
    for part in images.split(2000):
        small = F.adaptive_avg_pool2d(part.permute(0, 3, 1, 2).float(), 8).round().to(torch.uint8)
        parts.append(small.permute(0, 2, 3, 1))
    return parts


def layout(maps: Tensor, images: Tensor) -> float:
    """Return the share of the variance of 8×8 mean colours that a linear readout of each patch feature explains.

    Fitted by ridge regression on the first half of the images, measured on the other.
    """
    grid = maps.shape[-2:]
    target = F.adaptive_avg_pool2d(images[: len(maps)].permute(0, 3, 1, 2).float() / 127.5 - 1.0, grid)
    x = maps.permute(0, 2, 3, 1).flatten(1, 2).double().cpu()
    y = target.permute(0, 2, 3, 1).flatten(1, 2).double()
    half = len(x) // 2
    fit_x, fit_y, test_x, test_y = (
        x[:half].flatten(0, 1),
        y[:half].flatten(0, 1),
        x[half:].flatten(0, 1),
        y[half:].flatten(0, 1),
    )
    mean_x, mean_y = fit_x.mean(0), fit_y.mean(0)
    centred = fit_x - mean_x
    gram = centred.T @ centred + 1e-3 * len(centred) * torch.eye(x.shape[-1], dtype=torch.double)
    solution = torch.linalg.solve(gram, centred.T @ (fit_y - mean_y))
    error = ((test_x - mean_x) @ solution + mean_y - test_y).square().mean()
    return float(1.0 - error / test_y.var(0, correction=0).mean())


def measure(args: argparse.Namespace) -> None:
    """Measure every named encoder."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load_images(args.data, args.size, args.train, args.validation, args.workers)
    answers, labels = data["validation_labels"].to(device), data["train_labels"].to(device)
    rows: dict[str, Any] = {"train": len(labels), "validation": len(answers), "size": args.size, "encoders": {}}
    for name in args.names:
        start = time.perf_counter()
        bank, _ = features(name, data["train"], device)
        queries, maps = features(name, data["validation"], device)
        rows["encoders"][name] = {
            "knn": round(nearest_neighbours(bank, labels, queries, answers), 4),
            "linear": round(linear_probe(bank, labels, queries, answers), 4),
            "layout": round(layout(maps, data["validation"]), 4),
            "seconds": round(time.perf_counter() - start, 1),
        }
        print(name, rows["encoders"][name], flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


@torch.inference_mode()
def pictures(args: argparse.Namespace) -> None:
    """Write validation images and, row by row, the principal components of their patch features.

    Two rows for each encoder: images of the size given, and the same images enlarged to twice that.
    """
    images = load_images(args.data, args.size, 1, args.columns, 1)["validation"]
    pixels = to_tensor(images)
    side = 2 * args.size
    rows = [enlarge(images.numpy(), side, side)]
    for name in args.names:
        encoder = underpaint.create("encoder", name).eval()
        for scale in (1, 2):
            seen = F.interpolate(pixels, scale_factor=scale, mode="bicubic", antialias=True).clamp(-1, 1)
            rows.append(enlarge(latent_pca(encoder(seen).maps[-1].numpy()), side, side))
    args.out.write_bytes(contact_sheet(np.concatenate(rows), args.columns))


def pack(args: argparse.Namespace) -> None:
    """Write the encoder of a run as bf16 safetensors."""
    (folder,) = [stage / "tokenizer" for stage in (args.run / "stages").iterdir()]
    state = load_file(folder / "model.safetensors")
    own = {n.removeprefix("encoder."): t.bfloat16().contiguous() for n, t in state.items() if n.startswith("encoder.")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(own, args.out)
    print(args.out, args.out.stat().st_size, underpaint.tensor_hash(own))


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("measure")
    one.add_argument("names", nargs="+")
    one.add_argument("--data", required=True)
    one.add_argument("--size", type=int, default=64)
    one.add_argument("--train", type=int, default=10**9)
    one.add_argument("--validation", type=int, default=10**9)
    one.add_argument("--workers", type=int, default=2)
    one.add_argument("--out", type=Path)
    one.set_defaults(call=measure)
    three = commands.add_parser("pictures")
    three.add_argument("names", nargs="+")
    three.add_argument("--data", required=True)
    three.add_argument("--size", type=int, default=64)
    three.add_argument("--columns", type=int, default=12)
    three.add_argument("--out", type=Path, required=True)
    three.set_defaults(call=pictures)
    two = commands.add_parser("pack")
    two.add_argument("run", type=Path)
    two.add_argument("--out", type=Path, required=True)
    two.set_defaults(call=pack)
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
