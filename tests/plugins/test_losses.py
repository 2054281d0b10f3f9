"""Every built-in loss against numpy or another library."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Normal, kl_divergence
from torch.func import functional_call
from torchmetrics.functional.image import lpips as torchmetrics_lpips

import underpaint
from underpaint import (
    ConfigError,
    DataError,
    Encoder,
    EncoderInfo,
    Features,
    Loss,
    Posterior,
    Prediction,
    Reconstruction,
    StepTensors,
)


def make(name: str, **options: Any) -> Loss:
    return underpaint.create("loss", name, **options)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(size: int = 8, b: int = 2) -> tuple[Tensor, Tensor]:
    a, c = (random(b, 3, size, size, seed=seed).clamp(-2, 2) / 2 for seed in (0, 1))
    return a, c


def image_step(images: Tensor, reconstruction: Tensor) -> StepTensors:
    return StepTensors(step=0, images=images, reconstruction=Reconstruction(reconstruction))


# -------------------------------------------------------------------------------------------------- pixels


def test_pixel_losses_are_means() -> None:
    images, decoded = pictures()
    gap = decoded.double().numpy() - images.double().numpy()
    step = image_step(images, decoded)
    assert float(make("l1")(step)["l1"]) == pytest.approx(np.abs(gap).mean(), rel=1e-6)
    assert float(make("mse")(step)["mse"]) == pytest.approx((gap**2).mean(), rel=1e-6)


def test_pixel_losses_are_computed_in_float32() -> None:
    images, decoded = pictures()
    terms = make("l1")(image_step(images, decoded.bfloat16()))
    assert terms["l1"].dtype == torch.float32


@pytest.mark.parametrize("name", ["l1", "mse", "features", "lpips"])
def test_gradient_reaches_the_reconstruction_only(name: str, eye: Any) -> None:
    options = {"features": {"encoder": "eye"}, "lpips": {"weights": "random"}}.get(name, {})
    images, decoded = (p.requires_grad_() for p in pictures(32, 1))
    loss = make(name, **options)
    loss(image_step(images, decoded))[name].backward()
    assert decoded.grad is not None
    assert float(decoded.grad.abs().sum()) > 0
    assert name in ("l1", "mse") or images.grad is None
    assert all(p.grad is None and not p.requires_grad for p in loss.parameters())


# ------------------------------------------------------------------------------------------------------ kl


def test_kl_agrees_with_torch_distributions() -> None:
    mean, logvar = random(3, 4, 2, 2).double(), random(3, 4, 2, 2, seed=1).double()
    term = make("kl")(StepTensors(step=0, posterior=Posterior(mean, logvar)))["kl"]
    wanted = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum((1, 2, 3)).mean()
    assert float(term) == pytest.approx(float(wanted), rel=1e-10)


def test_kl_of_a_point_is_refused() -> None:
    with pytest.raises(ConfigError, match="remove the loss 'kl'"):
        make("kl")(StepTensors(step=0, posterior=Posterior(random(1, 2, 2, 2))))


# ------------------------------------------------------------------------------------------------ velocity


def test_velocity_is_the_mean_squared_error() -> None:
    predicted, target = random(2, 4, 3, 5), random(2, 4, 3, 5, seed=1)
    terms = make("velocity")(StepTensors(step=0, prediction=Prediction(predicted), target=target))
    assert list(terms) == ["velocity"]
    expected = ((predicted.double() - target.double()).numpy() ** 2).mean()
    assert float(terms["velocity"]) == pytest.approx(expected, rel=1e-6)


def test_cosine_term_is_over_channels_and_apart() -> None:
    predicted, target = random(2, 4, 3, 5), random(2, 4, 3, 5, seed=1)
    terms = make("velocity", cosine=0.5)(StepTensors(step=0, prediction=Prediction(predicted), target=target))
    p, q = predicted.double().numpy(), target.double().numpy()
    cosine = (p * q).sum(1) / np.sqrt((p**2).sum(1) * (q**2).sum(1))
    assert set(terms) == {"velocity", "velocity_cosine"}
    assert float(terms["velocity_cosine"]) == pytest.approx(0.5 * (1 - cosine.mean()), rel=1e-5)


# ------------------------------------------------------------------------------------------------ features


class Eye(Encoder):
    """Two maps of different grids, linear in the image: every value can be worked out by hand."""

    info = EncoderInfo(
        channels=(3, 3),
        stride=4,
        patch=4,
        native_size=(8, 8),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        layers=(0, 1),
        licence="none",
        source="this test",
    )

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.dropout = nn.Dropout(0.9)

    def forward(self, images: Tensor) -> Features:
        fine = self.dropout(self.gain * images)
        return Features((fine, nn.functional.avg_pool2d(fine, 4)))


@pytest.fixture
def eye(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    asked: dict[str, Any] = {}
    create = underpaint.create

    def fake(kind: Any, name: str, **options: Any) -> Any:
        if (kind, name) == ("encoder", "eye"):
            asked.update(options)
            return Eye()
        return create(kind, name, **options)

    monkeypatch.setattr(underpaint, "create", fake)
    return asked


def test_feature_distance_by_its_definition(eye: dict[str, Any]) -> None:
    images, decoded = pictures()
    loss = make("features", encoder="eye").train()
    assert not loss.training
    value = float(loss(image_step(images, decoded))["features"])

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).sum(1, keepdims=True))

    def pool(x: np.ndarray) -> np.ndarray:
        return x.reshape(2, 3, 2, 4, 2, 4).mean((3, 5))

    a, b = images.double().numpy(), decoded.double().numpy()
    fine = ((unit(a) - unit(b)) ** 2).sum(1).mean()
    coarse = ((unit(pool(a)) - unit(pool(b))) ** 2).sum(1).mean()
    assert value == pytest.approx((fine + coarse) / 2, rel=1e-5)


def test_feature_distance_of_equal_and_opposite_images(eye: dict[str, Any]) -> None:
    images, _ = pictures()
    loss = make("features", encoder="eye")
    assert float(loss(image_step(images, images.clone()))["features"]) == 0.0
    assert float(loss(image_step(images, -images))["features"]) == pytest.approx(4.0, rel=1e-5)


def test_feature_distance_hands_its_options_to_the_encoder(eye: dict[str, Any]) -> None:
    make("features", encoder="eye", layers=[3, 7], options={"resize": 64})
    assert eye == {"layers": (3, 7), "resize": 64}


def test_feature_distance_refuses_sizes_that_do_not_fit(eye: dict[str, Any]) -> None:
    images, decoded = pictures(10)
    with pytest.raises(DataError, match="10×10 px do not divide"):
        make("features", encoder="eye")(image_step(images, decoded))


# --------------------------------------------------------------------------------------------------- lpips

VGG = [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]
HEADS = [f"lin{i}.model.1.weight" for i in range(5)]


def vgg_weights() -> dict[str, Tensor]:
    """Random weights under torchvision's keys: convolutions at 0, 2, 5, 7, 10, … of `features`."""
    state, index, inputs = {}, 0, 3
    for level, (width, depth) in enumerate(VGG):
        for _ in range(depth):
            scale = (2 / (9 * inputs)) ** 0.5
            state[f"features.{index}.weight"] = scale * random(width, inputs, 3, 3, seed=index)
            state[f"features.{index}.bias"] = 0.1 * random(width, seed=index + 100)
            index, inputs = index + 2, width
        index += 1
        state[HEADS[level]] = random(1, width, 1, 1, seed=level + 200).abs()
    state["classifier.0.weight"] = random(2, 2)
    return state


def lpips_in_numpy(state: dict[str, Tensor], a: Tensor, b: Tensor) -> float:
    weights = {name: value.double().numpy() for name, value in state.items()}
    shift = np.array([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1)
    scale = np.array([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1)

    def layers(x: np.ndarray) -> list[np.ndarray]:
        index, found = 0, []
        for level, (_, depth) in enumerate(VGG):
            if level:
                n, c, h, w = x.shape
                x = x.reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))
            for _ in range(depth):
                padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
                windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
                kernel = weights[f"features.{index}.weight"]
                x = np.tensordot(windows, kernel, axes=((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2)
                x = np.maximum(x + weights[f"features.{index}.bias"][:, None, None], 0)
                index += 2
            index += 1
            found.append(x / np.sqrt((x**2).sum(1, keepdims=True)))
        return found

    total = 0.0
    for level, (p, q) in enumerate(
        zip(layers((a.double().numpy() - shift) / scale), layers((b.double().numpy() - shift) / scale), strict=True)
    ):
        total += (((p - q) ** 2) * weights[HEADS[level]]).sum(1).mean()
    return total


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_lpips_agrees_with_float64_numpy(tmp_path: Path, suffix: str) -> None:
    state = vgg_weights()
    path = tmp_path / f"vgg{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    images, decoded = pictures(32)
    value = float(make("lpips", weights=str(path))(image_step(images, decoded))["lpips"])
    assert value == pytest.approx(lpips_in_numpy(state, images, decoded), rel=1e-4)


def test_lpips_loads_its_files_from_urls(tmp_path: Path) -> None:
    state = vgg_weights()
    torch.save({k: v for k, v in state.items() if k not in HEADS}, tmp_path / "vgg16.pth")
    save_file({k: state[k] for k in HEADS}, tmp_path / "heads.safetensors")
    urls = [(tmp_path / name).as_uri() for name in ("vgg16.pth", "heads.safetensors")]
    assert all(url.startswith("file:///") for url in urls)
    loss = make("lpips", weights=urls[0], heads=urls[1])
    assert torch.equal(loss.trunk[28].weight, state["features.28.weight"])
    assert torch.equal(loss.heads[4], state[HEADS[4]].flatten())
    with pytest.raises(DataError, match="There is no weights file"):
        make("lpips", weights=urls[0] + ".gone")


@pytest.mark.slow
def test_lpips_agrees_with_torchmetrics_and_its_published_heads(tmp_path: Path) -> None:
    state = {name: value for name, value in vgg_weights().items() if name.startswith("features.")}
    save_file(state, tmp_path / "vgg.safetensors")
    heads = Path(inspect.getfile(torchmetrics_lpips)).with_name("lpips_models") / "vgg.pth"
    peer = torchmetrics_lpips._LPIPS(pretrained=True, net="vgg", pnet_rand=True, use_dropout=True)
    for name, tensor in state.items():
        _, index, leaf = name.split(".")
        owner = next(s for s in peer.net.children() if index in dict(s.named_children()))
        getattr(owner, index).__getattr__(leaf).data.copy_(tensor)
    images, decoded = pictures(48)
    loss = make("lpips", weights=f"file:{tmp_path / 'vgg.safetensors'}", heads=str(heads))
    wanted = peer(images, decoded).mean()
    assert float(loss(image_step(images, decoded))["lpips"]) == pytest.approx(float(wanted), rel=1e-4)


def test_lpips_on_a_gpu_hands_channels_last_on_through_all_layers() -> None:
    """A GPU's strides without a GPU: fake tensors know shapes and layouts, and no values."""
    loss = make("lpips", weights="random")
    seen: list[bool] = []
    for module in loss.trunk:
        module.register_forward_hook(
            lambda module, given, found: seen.append(found.is_contiguous(memory_format=torch.channels_last))
        )
    with FakeTensorMode() as fake:
        state = {**dict(loss.named_parameters()), **dict(loss.named_buffers())}
        moved = {name: fake.from_tensor(tensor).to("cuda") for name, tensor in state.items()}
        images = torch.empty(2, 3, 64, 64, device="cuda")
        functional_call(loss, moved, (image_step(images, images.clone()),))
    assert seen == [True] * (2 * len(loss.trunk))


def test_the_layout_of_lpips_changes_no_number() -> None:
    images, decoded = pictures(32)
    loss = make("lpips", weights="random")
    values, gradients = [], []
    for layout in (torch.contiguous_format, torch.channels_last):
        shown = decoded.clone(memory_format=layout).requires_grad_()
        value = loss(image_step(images.contiguous(memory_format=layout), shown))["lpips"]
        value.backward()
        values.append(float(value.detach()))
        gradients.append(shown.grad)
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5 * float(gradients[0].abs().max()))
    assert all(tensor.is_contiguous() for tensor in loss.state_dict().values())


def test_lpips_of_equal_images_is_zero_and_its_parts_stay_frozen() -> None:
    images, _ = pictures(32)
    loss = make("lpips", weights="random").train()
    assert not loss.training
    assert float(loss(image_step(images, images.clone()))["lpips"]) == 0.0
    # VGG-16 without its classifier has 14,714,688 parameters, the heads one per channel.
    assert sum(p.numel() for p in loss.parameters()) == 14_714_688 + 64 + 128 + 256 + 512 + 512


def test_lpips_finds_vgg_in_the_hub_folder_and_its_heads_in_torchmetrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(DataError, match=r"vgg16-397923af.pth'; set 'download: true'.*'weights'.*the loss 'features'"):
        make("lpips")
    state = {name: value for name, value in vgg_weights().items() if name not in HEADS}
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints" / "vgg16-397923af.pth")
    loss = make("lpips")
    assert torch.equal(loss.trunk[28].weight, state["features.28.weight"])
    file = Path(inspect.getfile(torchmetrics_lpips)).with_name("lpips_models") / "vgg.pth"
    published = torch.load(file, map_location="cpu")
    assert torch.equal(loss.heads[2], published[HEADS[2]].flatten())


def test_lpips_lets_torch_download_vgg_and_check_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def fetch(url: str, path: str, hash_prefix: str, progress: bool) -> None:
        assert url.endswith("vgg16-397923af.pth")
        assert hash_prefix == "397923af"
        torch.save(vgg_weights(), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    loss = make("lpips", download=True)
    assert torch.equal(loss.trunk[0].bias, vgg_weights()["features.0.bias"])

    def offline(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "empty"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(DataError, match=r"cannot be downloaded.*no route to host.*'weights'"):
        make("lpips", download=True)
    with pytest.raises(ConfigError, match="'weights' beside 'download: true'"):
        make("lpips", download=True, weights="random")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features.7.bias": None}, "lacks 'features.7.bias'"),
        ({"features.0.weight": torch.zeros(64, 1, 3, 3)}, "has another shape of 'features.0.weight'"),
        ({HEADS[2]: None}, "lacks 'lin2.model.1.weight'"),
    ],
)
def test_lpips_files_that_do_not_fit_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    state = {name: value for name, value in {**vgg_weights(), **change}.items() if value is not None}
    save_file(state, tmp_path / "vgg.safetensors")
    with pytest.raises(DataError, match=message):
        make("lpips", weights=str(tmp_path / "vgg.safetensors"))
