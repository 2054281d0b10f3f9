"""The built-in metrics, against independent references."""

from __future__ import annotations

import copy
import hashlib
import math
import pickle
import warnings
from pathlib import Path

import attrs
import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
import torch.multiprocessing
from torch import nn
from torchmetrics.functional.image import structural_similarity_index_measure

import underpaint
from underpaint import ConfigError, DataError, Encoder, EncoderInfo, Features
from underpaint.registration.discovery import Switches
from underpaint.registration.manager import PluginManager, manager, reset_manager
from underpaint.registration.registrar import Registration
from underpaint_metrics.config import INCEPTION_FILE
from underpaint_metrics.gaussian import Gaussian, fit, frechet_distance
from underpaint_metrics.images import to_levels
from underpaint_metrics.paired import psnr, ssim


@attrs.frozen(kw_only=True)
class FakeConfig:
    seed: int | None = 0
    pooled: bool = True
    source: str = "random initialisation"


class FakeEncoder(Encoder):
    """Mean colour of the image's four quarters, mixed by a fixed random matrix."""

    def __init__(self, config: FakeConfig, *, weights: str | None, load: bool = True) -> None:
        super().__init__()
        generator = None if config.seed is None else torch.Generator().manual_seed(config.seed)
        self.matrix = nn.Parameter(torch.randn(12, 8, generator=generator))
        self.dropout = nn.Dropout(0.5)
        self.pooled = config.pooled
        self.info = EncoderInfo(
            channels=(3,), stride=8, patch=8, native_size=(20, 36), mean=(0, 0, 0), std=(1, 1, 1), layers=(0,),
            licence="CC0-1.0", source=config.source,
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> Features:
        cells = nn.functional.adaptive_avg_pool2d(images, 2)
        pooled = self.dropout(cells.flatten(1)) @ self.matrix
        return Features(maps=(cells,), pooled=pooled if self.pooled else None)


def use_fake_plugin() -> None:
    reset_manager(PluginManager(Switches(only=("metrics",))))
    manager().catalogue.add(
        Registration(
            kind="encoder",
            name="fake/quarters",
            target=f"{__name__}:FakeEncoder",
            config=f"{__name__}:FakeConfig",
            takes_weights=True,
        )
    )


@pytest.fixture(autouse=True)
def plugins():
    use_fake_plugin()
    yield
    reset_manager(None)


def pictures(count: int, seed: int = 0, height: int = 16, width: int = 24) -> torch.Tensor:
    """Smooth random images with values a little beyond [-1, 1]."""
    noise = torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))
    return nn.functional.avg_pool2d(noise, 3, 1, 1) * 2


def features_of(images: torch.Tensor, seed: int = 0) -> np.ndarray:
    """What FakeEncoder gives for 8-bit images, in float64 numpy."""
    levels = np.clip(np.round((images.numpy().astype(np.float64) + 1) * 127.5), 0, 255)
    cells = (levels / 127.5 - 1).reshape(len(images), 3, 2, images.shape[2] // 2, 2, images.shape[3] // 2).mean((3, 5))
    matrix = torch.randn(12, 8, generator=torch.Generator().manual_seed(seed)).numpy()
    return cells.reshape(len(images), 12) @ matrix


def sqrtm_distance(x: np.ndarray, y: np.ndarray) -> float:
    """The textbook form, by scipy."""
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real))


# ---------------------------------------------------------------------------- 8 bits


def test_images_are_rounded_to_levels():
    values = torch.tensor([-1.2, -1.0, -1.0 + 0.6 / 127.5, 0.0, 0.999, 1.0, 7.0])
    levels = to_levels(values.expand(2, 3, 1, 7))
    assert levels.dtype == torch.uint8
    assert levels[1, 2, 0].tolist() == [0, 0, 1, 128, 255, 255, 255]


def test_levels_survive_the_way_to_images_and_back():
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    assert torch.equal(to_levels(levels.float() / 127.5 - 1), levels)


@pytest.mark.parametrize("name", ["psnr", "ssim"])
def test_differences_below_a_level_do_not_count(name):
    levels = to_levels(pictures(2))
    exact = levels.float() / 127.5 - 1
    metric = underpaint.create("metric", name)
    metric.update(exact + 0.3 / 127.5, exact)
    assert metric.compute()[name] == {"psnr": 100.0, "ssim": pytest.approx(1.0)}[name]


@pytest.mark.parametrize("name", ["psnr", "ssim"])
def test_paired_metrics_refuse_what_cannot_be_compared(name):
    metric = underpaint.create("metric", name)
    images = pictures(3)
    with pytest.raises(DataError, match="give both"):
        metric.update(images, None)
    with pytest.raises(DataError, match="one shape"):
        metric.update(images, images[:2])
    with pytest.raises(DataError, match="B×3×H×W"):
        metric.update(images[:, :1], images[:, :1])
    broken = images.clone()
    broken[1, 0, 3, 3] = math.nan
    with pytest.raises(DataError, match="1 of 3 images"):
        metric.update(broken, images)
    assert int(metric.count) == 0


def test_no_images_is_an_error():
    metric = underpaint.create("metric", "psnr")
    empty = torch.zeros(0, 3, 16, 16)
    metric.update(empty, empty)
    with pytest.raises(DataError, match="no images"):
        metric.compute()


# ---------------------------------------------------------------------------- PSNR


def test_psnr_of_a_known_error():
    # Every sample is off by 5 levels: 20·log10(255 / 5).
    reference = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    assert psnr(reference + 5, reference).tolist() == pytest.approx([20 * math.log10(51)] * 2, abs=1e-12)


def test_psnr_is_the_mean_of_the_images_and_capped():
    images = torch.zeros(2, 3, 8, 8)
    references = images.clone()
    references[0] += 10 / 127.5
    metric = underpaint.create("metric", "psnr")
    metric.update(images, references)
    assert metric.compute() == {"psnr": pytest.approx((20 * math.log10(25.5) + 100) / 2, abs=1e-9)}
    assert metric.protocol()["cap"] == 100
    assert metric.protocol()["images"] == 2


# ---------------------------------------------------------------------------- SSIM


def scipy_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of two C×H×W images in float64, on scipy's own Gaussian filter."""

    def blur(a):
        return scipy.ndimage.gaussian_filter(a, sigma=1.5, radius=5, mode="constant")[5:-5, 5:-5]

    values = []
    for a, b in zip(x.astype(np.float64), y.astype(np.float64), strict=True):
        ma, mb = blur(a), blur(b)
        va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
        c1, c2 = 2.55**2, 7.65**2
        values.append(((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean())
    return float(np.mean(values))


def test_ssim_agrees_with_scipy():
    a, b = to_levels(pictures(4, 1, 21, 30)), to_levels(pictures(4, 2, 21, 30) * 0.6 + pictures(4, 1, 21, 30))
    expected = [scipy_ssim(x, y) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert ssim(a, b).tolist() == pytest.approx(expected, abs=1e-10)
    assert 0.05 < min(expected) < max(expected) < 0.95


def test_ssim_agrees_with_torchmetrics_inside_the_image():
    a, b = to_levels(pictures(2, 1)).double(), to_levels(pictures(2, 1) + pictures(2, 2)).double()
    _, maps = structural_similarity_index_measure(a, b, data_range=255.0, return_full_image=True)
    assert ssim(a, b).tolist() == pytest.approx(maps[..., 5:-5, 5:-5].flatten(1).mean(1).tolist(), abs=1e-9)


def test_ssim_of_flat_images_is_the_luminance_term():
    a, b = torch.full((1, 3, 11, 11), 100), torch.full((1, 3, 11, 11), 120)
    assert ssim(a, b).item() == pytest.approx((2 * 100 * 120 + 2.55**2) / (100**2 + 120**2 + 2.55**2), abs=1e-9)


def test_ssim_needs_room_for_its_window():
    metric = underpaint.create("metric", "ssim")
    with pytest.raises(DataError, match="11×11"):
        metric.update(pictures(1, 0, 16, 10), pictures(1, 0, 16, 10))


# ---------------------------------------------------------------------------- the distance of Gaussians


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> Gaussian:
    return Gaussian(torch.from_numpy(mean), torch.from_numpy(covariance), None)


def random_covariance(rng: np.random.Generator, dimension: int) -> np.ndarray:
    factor = rng.normal(size=(dimension, 3 * dimension))
    return factor @ factor.T / dimension


@pytest.mark.parametrize("dimension", [1, 3, 20])
def test_distance_agrees_with_sqrtm(dimension):
    rng = np.random.default_rng(dimension)
    m1, m2 = rng.normal(size=(2, dimension))
    s1, s2 = random_covariance(rng, dimension), random_covariance(rng, dimension)
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert frechet_distance(gaussian(m1, s1), gaussian(m2, s2)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(gaussian(m2, s2), gaussian(m1, s1)) == pytest.approx(expected, rel=1e-9)


def test_distance_of_commuting_covariances():
    # With S = Q diag(a) Qᵀ and T = Q diag(b) Qᵀ the trace is Σ (√a − √b)², singular or not.
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    a, b = rng.uniform(1, 9, size=(2, 12))
    a[:4], b[2:7] = 0, 0
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    first, second = (gaussian(np.zeros(12), q @ np.diag(v) @ q.T) for v in (a, b))
    assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-6)


def test_distance_of_a_set_to_itself_is_zero():
    x = np.random.default_rng(0).normal(size=(20, 64)) * 10
    same = fit(20, torch.from_numpy(x.sum(0)), torch.from_numpy(x.T @ x))
    assert 0 <= frechet_distance(same, same) < 1e-6 * float(same.covariance.trace())


def test_the_fit_is_numpys():
    x = np.random.default_rng(0).normal(size=(30, 5)) + 3
    fitted = fit(30, torch.from_numpy(x.sum(0)), torch.from_numpy(x.T @ x))
    np.testing.assert_allclose(fitted.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(fitted.covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------- frechet


def frechet(**options):
    return underpaint.create("metric", "frechet", encoder="fake/quarters@random", **options)


def test_frechet_is_the_distance_of_the_encoders_features():
    images, references = pictures(40, 1), pictures(50, 2) + 0.2
    metric = frechet()
    metric.update(images, references)
    expected = sqrtm_distance(features_of(images), features_of(references))
    assert metric.compute() == {"frechet_distance[fake/quarters@random]": pytest.approx(expected, rel=1e-4)}
    metric.reset()
    metric.update(images, images)
    assert metric.compute()["frechet_distance[fake/quarters@random]"] < 1e-6


def test_the_order_of_images_and_sides_does_not_matter():
    images, references = pictures(40, 1), pictures(50, 2) + 0.2
    whole, parts = frechet(), frechet()
    whole.update(images, references)
    for start in (30, 0, 20, 10):
        parts.update(images[start : start + 10], None)
    parts.update(None, references[25:])
    parts.update(None, references[:25])
    assert list(parts.compute().values()) == pytest.approx(list(whole.compute().values()), abs=1e-6)


def test_mean_features_are_those_of_the_map():
    images, references = pictures(40, 1), pictures(50, 2) + 0.2
    metric = frechet(features="mean", options={"pooled": False})
    metric.update(images, references)
    x, y = (to_levels(side).double().numpy().mean((2, 3)) / 127.5 - 1 for side in (images, references))
    assert list(metric.compute().values()) == pytest.approx([sqrtm_distance(x, y)], rel=1e-4)
    assert metric.protocol()["features"] == "mean"
    assert metric.protocol()["dimension"] == 3


def test_an_encoder_without_pooled_features_is_refused():
    with pytest.raises(ConfigError, match="features: mean"):
        frechet(options={"pooled": False})


def test_the_protocol_tells_everything():
    metric = frechet(options={"seed": 3, "source": "a paper"})
    assert metric.protocol()["images"] is None
    metric.update(pictures(9), pictures(20, 1))
    metric.compute()
    held = dict(metric.protocol())
    weights = underpaint.tensor_hash({"matrix": metric.encoder.matrix})
    assert weights.startswith(held.pop("weights"))
    assert "8-bit" in held.pop("levels")
    assert held == {
        "metric": "frechet_distance",
        "extractor": "fake/quarters@random",
        "extractor_options": {"seed": 3, "pooled": True, "source": "a paper"},
        "random_features": False,
        "features": "pooled",
        "resize": "by the encoder",
        "image_size": ["16x24"],
        "images": 9,
        "references": 20,
        "reference_file": None,
        "dimension": 8,
        "covariance": "unbiased",
        "rank_deficient": False,
    }
    metric.reset()
    assert metric.protocol()["images"] is None


def test_random_features_and_too_few_images_are_flagged():
    metric = frechet()
    metric.update(pictures(8), pictures(20, 1))
    assert math.isfinite(*metric.compute().values())
    assert metric.protocol()["random_features"] is True
    assert metric.protocol()["rank_deficient"] is True
    assert frechet(options={"seed": 1}).protocol()["weights"] != metric.protocol()["weights"]


def test_random_features_are_the_same_in_every_process():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = frechet(options={"seed": None}).protocol()["weights"]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert frechet(options={"seed": None}).protocol()["weights"] == first


def test_a_weights_file_is_named_by_its_tensors():
    metric = underpaint.create("metric", "frechet", encoder="fake/quarters@file:/some/where.safetensors")
    assert "where" not in str(metric.value_name) + str(metric.protocol())
    assert metric.value_name == f"frechet_distance[fake/quarters@{metric.protocol()['weights'][:8]}]"


def test_fewer_than_two_images_are_refused():
    metric = frechet()
    metric.update(pictures(1), pictures(5))
    with pytest.raises(DataError, match="given 1 images"):
        metric.compute()
    metric.update(pictures(1), None)
    metric.compute()
    metric.reset()
    metric.update(pictures(5), None)
    with pytest.raises(DataError, match="given 0 references"):
        metric.compute()


def test_images_that_do_not_fit_the_encoder_are_refused():
    with pytest.raises(DataError, match="8 px cells"):
        frechet().update(pictures(2, 0, 16, 20), None)


def test_the_encoder_is_apart_from_the_state():
    metric = frechet()
    assert not list(metric.parameters())
    assert not metric.state_dict()
    assert not any(p.requires_grad for p in metric.encoder.parameters())
    metric.train()
    assert not metric.encoder.training
    images = pictures(12).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric.update(images, pictures(12, 1))
    other = frechet()
    other.update(images.detach(), pictures(12, 1))
    assert metric.compute() == other.compute()
    assert not metric.images_outer.requires_grad


def test_the_encoder_follows_the_metric_to_a_device():
    metric = frechet().to("meta")
    assert metric.encoder.matrix.device.type == "meta"
    assert metric.images_outer.device.type == "meta"
    kept = frechet().half()
    assert kept.encoder.matrix.dtype == torch.float32
    assert kept.images_outer.dtype == torch.float64


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", ["psnr", "ssim", "frechet"])
def test_copies_go_on_from_the_same_state(name, twin):
    options = {"encoder": "fake/quarters"} if name == "frechet" else {}
    metric = underpaint.create("metric", name, **options)
    metric.update(pictures(10, 1), pictures(10, 2))
    copied = twin(metric)
    for each in (metric, copied):
        each.update(pictures(10, 3), pictures(10, 4))
    assert copied.compute() == metric.compute()
    assert copied.protocol() == metric.protocol()
    assert copied.spec == metric.spec


# ---------------------------------------------------------------------------- reference statistics from a file


def write_reference(path: Path, features: np.ndarray, **more: object) -> str:
    np.savez(path, mu=features.mean(0), sigma=np.cov(features, rowvar=False), **more)
    return str(path)


def test_reference_statistics_come_from_a_file(tmp_path):
    images, references = pictures(40, 1), pictures(50, 2) + 0.2
    path = write_reference(tmp_path / "reference.npz", features_of(references), count=50)
    metric, plain = frechet(reference=path), frechet()
    assert not metric.needs_references
    assert plain.needs_references
    metric.update(images, None)
    plain.update(images, references)
    assert list(metric.compute().values()) == pytest.approx(list(plain.compute().values()), abs=1e-4)
    assert metric.protocol()["references"] == 50
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert metric.protocol()["reference_file"] == digest[:16]
    with pytest.raises(DataError, match="references=None"):
        metric.update(images, references)


def test_bad_reference_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no file .*gone\.npz"):
        frechet(reference=str(tmp_path / "gone.npz"))
    (tmp_path / "broken.npz").write_bytes(b"PK nothing")
    with pytest.raises(DataError, match="damaged"):
        frechet(reference=str(tmp_path / "broken.npz"))
    np.savez(tmp_path / "other.npz", mean=np.zeros(8))
    with pytest.raises(DataError, match="lack 'mu'"):
        frechet(reference=str(tmp_path / "other.npz"))
    with pytest.raises(DataError, match="8 features"):
        frechet(reference=write_reference(tmp_path / "seven.npz", np.eye(7)))
    with pytest.raises(DataError, match="not finite"):
        frechet(reference=write_reference(tmp_path / "nan.npz", np.full((9, 8), np.nan)))


# ---------------------------------------------------------------------------- fid


class FakeInception(nn.Module):
    """The interface of the Inception file: `layers` on normalised images, `forward` on levels."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 2048))
        for parameter in self.layers.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        features = self.layers((x - 128) / 128)
        return features if return_features else features[:, :10]


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("inception") / INCEPTION_FILE
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", Warning)
        torch.jit.script(FakeInception()).save(str(path))
    return str(path)


def test_fid_uses_clean_fids_resize_and_the_files_features(inception):
    from cleanfid.resize import make_resizer

    shrink = make_resizer("PIL", False, "bicubic", (299, 299))
    images = pictures(3, 1, 32, 40)
    metric = underpaint.create("metric", "fid", weights=inception)
    metric.update(images, images.flip(0))
    levels = np.clip(np.round((images.numpy() + 1) * 127.5), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    resized = torch.from_numpy(np.stack([shrink(image) for image in levels])).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = FakeInception().layers((resized - 128) / 128)
    torch.testing.assert_close(metric.images_total, expected.double().sum(0), rtol=1e-5, atol=1e-4)
    (value,) = metric.compute().values()
    assert value < 1e-6 * float(metric.images_outer.trace())
    assert metric.protocol()["metric"] == "fid"
    assert metric.protocol()["mode"] == "clean"
    assert hashlib.sha256(Path(inception).read_bytes()).hexdigest().startswith(metric.protocol()["weights"])
    assert metric.protocol()["rank_deficient"] is True


def test_fid_values_are_named_fid(inception, tmp_path):
    rng = np.random.default_rng(0)
    reference = write_reference(tmp_path / "r.npz", rng.normal(size=(3, 2048)))
    metric = underpaint.create("metric", "fid", weights=inception, mode="legacy_tensorflow", reference=reference)
    images = pictures(3, 1, 32, 40)
    metric.update(images, None)
    with torch.no_grad():
        expected = FakeInception()(to_levels(images).float(), return_features=True)
    torch.testing.assert_close(metric.images_total, expected.double().sum(0), rtol=1e-5, atol=1e-4)
    copied = pickle.loads(pickle.dumps(metric))
    copied.update(images, None)
    assert int(copied.images_count) == 6
    assert "inside" in copied.protocol()["resize"]
    assert list(metric.compute()) == ["fid"]


def test_fid_without_weights_says_what_to_do(tmp_path, monkeypatch, inception):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(DataError, match=rf"{INCEPTION_FILE}.*'weights'.*'download: true'.*'frechet'"):
        underpaint.create("metric", "fid")
    with pytest.raises(DataError, match=INCEPTION_FILE):
        underpaint.create("metric", "fid", weights=str(tmp_path / "other.pt"))
    with pytest.raises(ConfigError, match="keep one"):
        underpaint.create("metric", "fid", weights=inception, download=True)
    (tmp_path / INCEPTION_FILE).write_bytes(b"nothing")
    with pytest.raises(DataError, match="damaged"):
        underpaint.create("metric", "fid", weights=str(tmp_path / INCEPTION_FILE))


def test_fid_downloads_only_when_told_and_leaves_no_half_file(tmp_path, monkeypatch, inception):
    import cleanfid.downloads_helper

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"

    def broken(fpath):
        (Path(fpath) / INCEPTION_FILE).write_bytes(b"half")
        raise OSError("connection lost")

    monkeypatch.setattr(cleanfid.downloads_helper, "check_download_inception", broken)
    with pytest.raises(DataError, match="connection lost"):
        underpaint.create("metric", "fid", download=True)
    assert not list(folder.iterdir())

    def whole(fpath):
        target = Path(fpath) / INCEPTION_FILE
        target.write_bytes(Path(inception).read_bytes())
        return str(target)

    monkeypatch.setattr(cleanfid.downloads_helper, "check_download_inception", whole)
    underpaint.create("metric", "fid", download=True)
    assert [path.name for path in folder.iterdir()] == [INCEPTION_FILE]
    monkeypatch.setattr(cleanfid.downloads_helper, "check_download_inception", broken)
    assert underpaint.create("metric", "fid").value_name == "fid"


# ---------------------------------------------------------------------------- ranks


@torch.inference_mode()
def measure(images: torch.Tensor, references: torch.Tensor) -> dict[str, tuple[float, object]]:
    found = {}
    for name, options in (("psnr", {}), ("ssim", {}), ("frechet", {"encoder": "fake/quarters"})):
        metric = underpaint.create("metric", name, **options)
        metric.update(images, references)
        ((key, value),) = metric.compute().items()
        found[key] = (value, metric.protocol()["images"])
    return found


def run_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        use_fake_plugin()
        # Uneven shares: an average of the ranks' averages would differ.
        share = slice(0, 9) if rank == 0 else slice(9, 30)
        torch.save(measure(pictures(30, 1)[share], pictures(30, 2)[share]), f"{folder}/rank{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    expected = measure(pictures(30, 1), pictures(30, 2))
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert found.keys() == expected.keys()
        for key, (value, count) in expected.items():
            assert found[key] == (pytest.approx(value, rel=1e-6), count)
            assert count == 30
