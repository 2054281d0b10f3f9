"""What a representation knows: nearest neighbours and linear probes on frozen features."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from underpaint.data.loader import Batch
from underpaint.data.transforms import to_tensor
from underpaint.models.tokenizer import Tokenizer

__all__ = ["linear_probe", "nearest_neighbours", "pooled_latents"]


@torch.no_grad()
def pooled_latents(tokenizer: Tokenizer, images: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Return what is probed of a tokenizer, on the CPU: the mean of each latent over its grid (aligntok.md §8).

    Args:
        tokenizer: On its device, in evaluation mode.
        images: With labels.

    Returns:
        N×d features in fp32, and the N labels.
    """
    device = next(tokenizer.parameters()).device
    features = [torch.zeros(0, tokenizer.latent_channels)]
    labels = [torch.zeros(0, dtype=torch.int64)]
    for batch in images:
        assert batch.labels is not None
        features.append(tokenizer.encode(to_tensor(batch.images.to(device))).float().mean((2, 3)).cpu())
        labels.append(batch.labels)
    return torch.cat(features), torch.cat(labels)


@torch.inference_mode()
def nearest_neighbours(
    features: Tensor, labels: Tensor, queries: Tensor, answers: Tensor, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Return the top-1 accuracy of a weighted vote of the nearest neighbours (Wu et al. 2018, §3.4).

    Features are scaled to unit length; a neighbour of similarity s votes with exp(s / temperature).

    Args:
        features: N×C of the training images.
        labels: N class indices.
        queries: M×C of the images to classify.
        answers: M class indices.
        k: Neighbours.
        temperature: Of the vote.
    """
    classes = int(torch.cat([labels, answers]).max()) + 1
    bank = F.normalize(features.float(), dim=1)
    right = 0
    for query, answer in zip(torch.split(queries.float(), 1024), torch.split(answers, 1024), strict=True):
        similarity, index = (F.normalize(query, dim=1) @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(query), classes, device=query.device)
        votes.scatter_add_(1, labels[index], (similarity / temperature).exp())
        right += int((votes.argmax(1) == answer).sum())
    return right / len(answers)


def linear_probe(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    answers: Tensor,
    *,
    epochs: int = 60,
    batch: int = 2048,
    lr: float = 3e-3,
    decays: tuple[float, ...] = (0.0, 1e-3, 1e-2, 1e-1),
    seed: int = 0,
) -> float:
    """Return the top-1 accuracy of a linear classifier on frozen features.

    Features are standardised per channel; the classifier is trained with AdamW and a cosine schedule. Its weight decay
    is chosen on a twentieth of the training features that is kept aside, never on the queries.

    Args:
        features: N×C of the training images.
        labels: N class indices.
        queries: M×C of the images to classify.
        answers: M class indices.
        epochs: Passes over the training features.
        batch: Features of one step.
        lr: Peak learning rate.
        decays: Weight decays to choose from.
        seed: Seed of order and split.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(features), generator=generator).to(features.device)
    mean, std = features.float().mean(0), features.float().std(0).clamp_min(1e-6)
    x, y = ((features.float() - mean) / std)[order], labels[order]
    held = max(1, len(x) // 20)
    best = max(decays, key=lambda decay: _fit(x[held:], y[held:], x[:held], y[:held], epochs, batch, lr, decay))
    return _fit(x, y, (queries.float() - mean) / std, answers, epochs, batch, lr, best)


def _fit(
    x: Tensor, y: Tensor, queries: Tensor, answers: Tensor, epochs: int, batch: int, lr: float, decay: float
) -> float:
    classes = int(torch.cat([y, answers]).max()) + 1
    weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=lr, weight_decay=decay)
    steps = epochs * max(1, len(x) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(0, len(x), (min(batch, len(x)),), generator=generator).to(x.device)
            loss = F.cross_entropy(F.linear(x[rows], weight, bias), y[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return float((F.linear(queries, weight, bias).argmax(1) == answers).float().mean())
