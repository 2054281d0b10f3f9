"""The projected critic: its heads, what it shows to the encoder, and what it leaves alone."""

from __future__ import annotations

import math
import pickle
import zlib
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import underpaint
from underpaint import (
    AdversarialLoss,
    ConfigError,
    DataError,
    Encoder,
    EncoderInfo,
    Features,
    Reconstruction,
    StepTensors,
    UnreachableError,
)
from underpaint_critics.projected import _Head

PLAIN = {"color": False, "translation": 0.0, "cutout": 0.0, "crop": 0.0}


class Eye(Encoder):
    """Two maps that are linear in the image, for images of 16 px; it keeps what it was shown."""

    info = EncoderInfo(
        channels=(6, 6),
        stride=4,
        patch=4,
        native_size=(16, 16),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        layers=(0, 1),
        licence="none",
        source="this test",
    )
    pooled = True

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Conv2d(3, 6, 4, 4)
        self.shown: list[Tensor] = []

    def forward(self, images: Tensor) -> Features:
        self.shown.append(images.detach())
        x = self.map(images)
        tokens = (x.amax((2, 3)), x.amin((2, 3)))
        return Features((x, torch.tanh(x)), x.mean((2, 3)) if self.pooled else None, tokens if self.pooled else None)


class Patch14(Eye):
    """Trained at 28 px; takes images whose cells are 16 px, and gives neither summary nor class tokens."""

    info = attrs.evolve(Eye.info, stride=16, patch=14, native_size=(28, 28))
    pooled = False


@pytest.fixture(autouse=True)
def eyes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Eye, dict[str, Any]]]:
    made: list[tuple[Eye, dict[str, Any]]] = []
    create = underpaint.create

    def fake(kind: Any, name: str, **options: Any) -> Any:
        if kind == "encoder" and name in ("eye", "patch14"):
            made.append((Eye() if name == "eye" else Patch14(), options))
            return made[-1][0]
        return create(kind, name, **options)

    monkeypatch.setattr(underpaint, "create", fake)
    return made


def make(name: str = "projected", **options: Any) -> AdversarialLoss:
    torch.manual_seed(0)
    return underpaint.create("loss", f"critics/{name}", **{"encoder": "eye", **options})


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def shown(height: int = 16, width: int = 16, b: int = 2) -> StepTensors:
    decoded = random(b, 3, height, width, seed=1).requires_grad_()
    return StepTensors(step=0, images=random(b, 3, height, width), reconstruction=Reconstruction(decoded))


def test_its_encoder_is_compiled_unless_it_is_differentiated_twice() -> None:
    loss = make()
    assert loss.units() == loss.held
    assert make(r1=1.0).units() == ()


# --------------------------------------------------------------------------------------------------- heads


def test_published_parameter_count_of_a_head() -> None:
    assert sum(p.numel() for p in _Head(384, 8).parameters()) == 1_477_249


def formula(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers that anyone can make again, by name and index; spectral vectors have unit length."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    values = torch.sin(index * (3 * 0.7548776662466927) + zlib.crc32(name.encode()) % 1000).view(shape)
    if name.endswith((".left", ".right")):
        values = values / values.norm()
    return (1 + 0.1 * values if name.endswith(".1.weight") else values).float()


def test_head_agrees_with_rae() -> None:
    # Recorded from the head of RAE's discriminator (12 channels, kernel 9, local norm of one sample, eps 1e-5), its
    # parameters and spectral vectors filled by the formula under our names.
    head = _Head(12, 1).eval()
    head.load_state_dict({name: formula(name, tuple(value.shape)) for name, value in head.state_dict().items()})
    out = head(formula("x", (3, 12, 10))).detach()
    torch.testing.assert_close(
        out.flatten()[:5], torch.tensor([1.758748, 0.917666, 0.029957, 1.400685, 0.134569]), atol=1e-5, rtol=1e-5
    )
    assert float(out.mean()) == pytest.approx(0.9257867, abs=1e-5)
    assert float(out.std()) == pytest.approx(0.8348755, abs=1e-5)


@torch.no_grad()
def test_logits_of_all_heads_count_the_same() -> None:
    loss = make(**PLAIN, summary="none").eval()
    step = shown()
    assert step.reconstruction is not None
    encoder = loss.held[0]
    maps = encoder(step.reconstruction.image).maps
    logits = [head(m.flatten(2)) for head, m in zip(loss.critic.heads, maps)]
    assert [x.shape for x in logits] == [(2, 1, 16)] * 2
    mean = float(torch.stack(logits).mean())
    assert float(loss(step)["adversarial"]) == pytest.approx(-mean, rel=1e-5)
    terms = {name: float(value) for name, value in loss.criticise(step).items()}
    # Not halved, as in StyleGAN-T.
    assert terms["critic_fake"] == pytest.approx(float(F.relu(1 + torch.stack(logits)).mean()), rel=1e-5)
    assert set(terms) == {"critic_real", "critic_fake"}


@pytest.mark.parametrize("summary", ["layer", "pooled", "none"])
def test_summary_is_added_to_every_cell(summary: str) -> None:
    loss = make(**PLAIN, summary=summary)
    images = random(2, 3, 16, 16)
    features = loss.held[0](images)
    added = {"layer": features.class_tokens, "pooled": [features.pooled] * 2, "none": torch.zeros(2, 2, 6)}[summary]
    for got, plain, token in zip(loss.look(images), features.maps, added, strict=True):
        torch.testing.assert_close(got, plain + token[..., None, None])


def test_an_encoder_without_summary_is_named() -> None:
    for summary, words in (
        ("layer", "'patch14' gives no class tokens; .*'summary' of the critic to 'pooled' or 'none'"),
        ("pooled", "'patch14' gives no summary.*'summary' of the critic to 'none'"),
    ):
        with pytest.raises(ConfigError, match=words):
            make(encoder="patch14", summary=summary)(shown(32, 32))
    make(encoder="patch14", summary="none")(shown(32, 32))


# ------------------------------------------------------------------------------------- what the encoder sees


def test_layers_and_options_reach_the_encoder(eyes: Any) -> None:
    make("vfm-vae")
    make(options={"stride": 8})
    make("rae")
    assert [options for _, options in eyes] == [
        {"layers": (2, 5, 8, 11), "norm": "none", "embedding": True},
        {"stride": 8},
        {"layers": (2, 5, 8, 11), "norm": "none"},
    ]


def test_images_are_resized_to_the_native_size(eyes: Any) -> None:
    loss = make(**PLAIN)
    images = random(2, 3, 24, 40)
    loss.look(images)
    wanted = F.interpolate(images, size=(16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(eyes[0][0].shown[-1], wanted)
    make(**PLAIN, size=32).look(images)
    assert eyes[1][0].shown[-1].shape == (2, 3, 32, 32)
    with pytest.raises(DataError, match="18×18 px do not divide"):
        make(size=18)


def test_an_encoder_that_resizes_by_itself_is_given_whole_cells(eyes: Any) -> None:
    make(encoder="patch14", summary="none", **PLAIN).look(random(1, 3, 64, 64))
    assert eyes[0][0].shown[-1].shape == (1, 3, 32, 32)


def test_half_of_the_batches_are_crops(eyes: Any) -> None:
    loss = make(**{**PLAIN, "crop": 0.5})
    rows, columns = torch.meshgrid(torch.arange(20.0), torch.arange(24.0), indexing="ij")
    images = torch.stack((rows, columns, rows)).expand(2, 3, 20, 24)
    corners = []
    for _ in range(400):
        loss.look(images)
        seen = eyes[0][0].shown[-1]
        assert seen.shape == (2, 3, 16, 16)
        top, left = seen[0, 0, 0, 0], seen[0, 1, 0, 0]
        if torch.equal(seen, images[..., int(top) : int(top) + 16, int(left) : int(left) + 16]):
            corners.append((int(top), int(left)))
    # 400 fair coins: four standard deviations are 40. All 5 · 9 places are met.
    assert abs(len(corners) - 200) < 40
    assert {top for top, _ in corners} == set(range(5))
    assert {left for _, left in corners} == set(range(9))


def test_small_images_are_never_cropped(eyes: Any) -> None:
    loss = make(**{**PLAIN, "crop": 1.0})
    images = random(1, 3, 8, 24)
    loss.look(images)
    torch.testing.assert_close(
        eyes[0][0].shown[-1], F.interpolate(images, size=(16, 16), mode="bilinear", antialias=True)
    )


def test_augmentation_differs_from_image_to_image_and_between_real_and_fake(eyes: Any) -> None:
    loss = make()
    image = random(1, 3, 16, 16).expand(2, 3, 16, 16)
    loss.criticise(StepTensors(step=0, images=image, reconstruction=Reconstruction(image)))
    seen = eyes[0][0].shown[-1]
    assert len({tuple(x.flatten().tolist()) for x in seen}) == 4


def test_rae_shows_its_critic_8_bits_and_its_model_all(eyes: Any) -> None:
    loss = make("rae", **PLAIN)
    assert len(loss.critic.heads) == 3
    step = shown()
    assert step.images is not None
    assert step.reconstruction is not None
    step.reconstruction.image.data.mul_(1.5)
    loss.criticise(step)
    real, fake = eyes[0][0].shown[-1].chunk(2)
    assert torch.equal(real, step.images)
    levels = (fake.double() + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert float(levels.min()) == pytest.approx(0)
    assert float(levels.max()) == pytest.approx(255)
    assert float((fake - step.reconstruction.image.detach().clamp(-1, 1)).abs().max()) <= 1 / 255 + 1e-6
    loss(step)
    assert torch.equal(eyes[0][0].shown[-1], step.reconstruction.image)


# ---------------------------------------------------------------------------------- what it leaves alone


def test_the_encoder_is_neither_trained_nor_saved_but_moves(eyes: Any) -> None:
    loss = make(**PLAIN)
    encoder = eyes[0][0]
    names = [name for name, _ in loss.named_parameters()]
    assert names
    assert all(name.startswith("critic.heads.") for name in [*names, *loss.state_dict()])
    loss.train().requires_grad_(True)
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    loss.to(torch.float64)
    assert encoder.map.weight.dtype == torch.float64
    loss.to("meta")
    assert encoder.map.weight.device.type == "meta"


@pytest.mark.parametrize("autocast", [True, False])
def test_heads_kept_in_bfloat16_judge_float32_images(autocast: bool) -> None:
    exact, rounded, step = make(**PLAIN), make(**PLAIN), shown()
    rounded.held[0].load_state_dict(exact.held[0].state_dict())
    rounded.critic.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        terms = {**rounded(step), **rounded.criticise(step)}
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rounded.critic.parameters())
    for term, value in {**exact(step), **exact.criticise(step)}.items():
        assert float(terms[term].detach()) == pytest.approx(float(value.detach()), rel=0.1, abs=0.1)


def test_it_can_be_pickled() -> None:
    loss = make(**PLAIN).eval()
    again = pickle.loads(pickle.dumps(loss))
    assert torch.equal(again(shown())["adversarial"], loss(shown())["adversarial"])


def test_the_model_step_touches_neither_critic_nor_encoder(eyes: Any) -> None:
    loss, step = make(), shown(24, 24)
    called: list[Any] = []
    for parameter in loss.critic.parameters():
        parameter.register_post_accumulate_grad_hook(called.append)
    state = {name: value.clone() for name, value in loss.critic.state_dict().items()}
    loss(step)["adversarial"].backward()
    assert called == []
    assert all(torch.equal(value, state[name]) for name, value in loss.critic.state_dict().items())
    assert all(p.grad is None for p in (*loss.critic.parameters(), *eyes[0][0].parameters()))
    assert step.reconstruction is not None
    assert float(step.reconstruction.image.grad.abs().sum()) > 0
    # The critic's own step moves its spectral vectors.
    loss.criticise(step)
    assert not torch.equal(loss.critic.heads[0].first[0].left, state["heads.0.first.0.left"])


def test_penalty_reaches_the_heads_through_a_transformer() -> None:
    # Fused attention has no second derivative, so this fails where it is used.
    small = {"width": 32, "depth": 2, "heads": 2}
    loss = make(encoder="tiny/vit@random", layers=[0, 1], options=small, summary="pooled", r1=1.0)
    terms = loss.criticise(shown(80, 80))
    terms["critic_r1"].backward()
    gradients = [p.grad for name, p in loss.critic.named_parameters() if name.endswith("weight")]
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in gradients)


# ------------------------------------------------------------------------------------ VFM-VAE's and RAE's


def test_vfm_vae_has_five_heads_on_dino() -> None:
    # vfm_vae.md §11: 1,477,249 a head.
    loss = make("vfm-vae", encoder="timm/vit_small_patch16_224@random")
    assert sum(p.numel() for p in loss.critic.parameters()) == 5 * 1_477_249 == 7_386_245
    with torch.no_grad():
        maps = loss.look(random(1, 3, 256, 256))
    assert [tuple(x.shape) for x in maps] == [(1, 384, 14, 14)] * 5
    assert sum(p.numel() for p in loss.held[0].parameters()) == pytest.approx(21.7e6, rel=2e-3)


def test_rae_has_heads_on_four_blocks_and_on_the_last_again() -> None:
    loss = make("rae", **PLAIN, encoder="timm/test_vit@random", layers=[1, 3, 5])
    images = random(1, 3, 160, 160)
    with torch.no_grad():
        maps = loss.look(images)
        plain = loss.held[0](images).maps
    assert len(plain) == 3
    assert all(torch.equal(a, b) for a, b in zip(maps, (*plain, plain[-1]), strict=True))


def transformer_taps(state: dict[str, Tensor], pixels: Tensor, heads: int, taps: tuple[int, ...]) -> list[Tensor]:
    """Return the tokens before the first block and after `taps` (Dosovitskiy et al. 2021, eq. 1 to 3)."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return centred * scale * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    kernel = state["patch_embed.proj.weight"]
    side = kernel.shape[-1]
    b, _, height, width = pixels.shape
    cells = pixels.reshape(b, 3, height // side, side, width // side, side).permute(0, 2, 4, 1, 3, 5).flatten(3)
    patches = cells.flatten(1, 2) @ kernel.flatten(1).T + state["patch_embed.proj.bias"]
    x = torch.cat((state["cls_token"].expand(b, 1, -1), patches), 1) + state["pos_embed"]
    found = [x]
    for index in range(max(taps) + 1):
        block = f"blocks.{index}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").view(b, x.shape[1], 3, heads, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        attended = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        out = linear(attended.transpose(1, 2).flatten(2), f"{block}.attn.proj")
        x = x + out * state.get(f"{block}.ls1.gamma", 1.0)
        hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(hidden, f"{block}.mlp.fc2") * state.get(f"{block}.ls2.gamma", 1.0)
        found += [x] if index in taps else []
    return found


@torch.no_grad()
def test_taps_are_those_of_vfm_vae() -> None:
    """Patch tokens plus the class token of the same layer, also of the embedding; all raw (vfm_vae.md §4.3)."""
    taps = (1, 3, 5)
    loss = make("vfm-vae", **PLAIN, encoder="timm/test_vit@random", layers=taps).double()
    encoder = loss.held[0]
    generator = torch.Generator().manual_seed(1)
    for parameter in encoder.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    images = random(2, 3, 160, 160).double()
    mean, std = (
        torch.tensor(value, dtype=torch.float64).view(3, 1, 1) for value in (encoder.info.mean, encoder.info.std)
    )
    state = {name.removeprefix("trunk."): value for name, value in encoder.state_dict().items()}
    tokens = transformer_taps(state, ((images + 1) / 2 - mean) / std, encoder.trunk.blocks[0].attn.num_heads, taps)
    wanted = [(x[:, 1:] + x[:, :1]).transpose(1, 2).reshape(2, 64, 10, 10) for x in tokens]
    maps = loss.look(images)
    assert len(maps) == 4
    for got, expected in zip(maps, wanted, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


def hub_with(monkeypatch: pytest.MonkeyPatch, found: Encoder | DataError) -> list[dict[str, Any]]:
    """Let the hub give DINO's weights, or fail; return the options it is asked with."""
    asked: list[dict[str, Any]] = []
    create = underpaint.create

    def fake(kind: Any, name: str, **options: Any) -> Any:
        if name != "timm/vit_small_patch16_224@dino":
            return create(kind, name, **options)
        asked.append(options)
        if isinstance(found, DataError):
            raise found
        return found

    monkeypatch.setattr(underpaint, "create", fake)
    return asked


def test_by_default_it_looks_through_dino(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    eye = Eye()
    asked = hub_with(monkeypatch, eye)
    loss = underpaint.create("loss", "critics/projected", **PLAIN)
    assert asked == [{"layers": (2, 5, 8, 11), "norm": "none", "embedding": True}]
    assert loss.held == (eye,)
    images = random(2, 3, 16, 16)
    features = eye(images)
    for got, plain, token in zip(loss.look(images), features.maps, features.class_tokens, strict=True):
        torch.testing.assert_close(got, plain + token[..., None, None])
    assert not caplog.records


def test_where_dino_cannot_be_had_it_looks_through_the_encoder_of_the_package_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub_with(monkeypatch, UnreachableError("The hub is away."))
    loss = underpaint.create("loss", "critics/projected")
    (encoder,) = loss.held
    assert encoder.spec.name == "tiny/vit"
    assert encoder.info.layers == (1, 3, 5)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "looks through tiny/vit" in record.getMessage()
    assert "The hub is away." in record.getMessage()
    terms = loss.criticise(shown(64, 64))
    assert all(value.isfinite() for value in terms.values())


def test_damaged_weights_are_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_with(monkeypatch, DataError("The file is damaged."))
    with pytest.raises(DataError, match="damaged"):
        underpaint.create("loss", "critics/projected")


def test_an_encoder_that_is_named_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_with(monkeypatch, UnreachableError("The hub is away."))
    for name, options in (("vfm-vae", {}), ("projected", {"encoder": "timm/vit_small_patch16_224@dino"})):
        with pytest.raises(UnreachableError, match="away"):
            underpaint.create("loss", f"critics/{name}", **options)


@pytest.mark.parametrize("option", [{"layers": (0, 1)}, {"options": {"norm": "none"}}, {"summary": "none"}])
def test_options_of_no_encoder_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no 'encoder' to which they belong; name it"):
        underpaint.create("loss", "critics/projected", **option)
