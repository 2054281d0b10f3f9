"""Text conditioners: agreement with the encoders' own libraries, null condition, memory, truncation, saving."""

from __future__ import annotations

import gc
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

import underpaint
from underpaint import Condition, Conditioner, ConfigError, DataError, LatentStatistics, NotFoundError, Tokenizer
from underpaint.cli.main import main
from underpaint.models.folders import save_generator
from underpaint.models.generator import Generator
from underpaint.registration.manager import manager
from underpaint_text.lost import Losses, losses

CLIP = "ViT-S-32-alt"
WORDS = ["a", "red", "fox", "sits", "on", "two", "boats", "in", "the", "snow", "at", "dawn"]
TEXTS = ["a red fox", "two boats in the snow at dawn", ""]


def make(name: str, **options: Any) -> Any:
    return underpaint.create("conditioner", name, width=16, classes=0, **options)


def close(got: Tensor | None, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert got is not None
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------- folders of transformers


def save_tokenizer(folder: Path, start: bool) -> None:
    """Write a tokenizer of whole words: padding 0, unknown 1, start 2, end 3."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>" if start else "$A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def save_model(kind: str, folder: Path) -> Any:
    """Write an encoder with random weights and its tokenizer, and return the encoder."""
    small = {"vocab_size": 32, "max_position_embeddings": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    clip = {**small, "hidden_size": 16, "intermediate_size": 32, "eos_token_id": 3, "bos_token_id": 2}
    torch.manual_seed(0)
    model: Any
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, decoder_start_token_id=0
        )
        model = transformers.T5EncoderModel(config)
    elif kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**small, hidden_size=16, intermediate_size=32))
    else:
        text = transformers.CLIPTextConfig(**clip, projection_dim=12)
        if kind == "clip":
            vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
            vision |= {"image_size": 32, "patch_size": 16}
            model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision))
        else:
            made = transformers.CLIPTextModelWithProjection if kind == "projected" else transformers.CLIPTextModel
            model = made(text)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    model.eval().save_pretrained(folder)
    save_tokenizer(folder, start=kind != "t5")
    return model


def token_ids(text: str, start: bool) -> Tensor:
    words = [4 + WORDS.index(word) for word in text.split()]
    return torch.tensor([[*([2] if start else []), *words, 3]])


@pytest.mark.parametrize("kind", ["t5", "bert", "text"])
def test_tokens_are_those_of_the_text_alone(kind: str, tmp_path: Path) -> None:
    """A masked batch gives each text what the encoder gives to it without padding."""
    model = save_model(kind, tmp_path)
    conditioner = make("text/hf", folder=str(tmp_path), length=12)
    assert (conditioner.token_dim, conditioner.pooled_dim) == (16, 16)
    condition = conditioner(TEXTS)
    assert condition.tokens.shape == (3, 12, 16)
    for index, text in enumerate(TEXTS):
        ids = token_ids(text, kind != "t5")
        n = ids.shape[1]
        with torch.no_grad():
            expected = model(input_ids=ids).last_hidden_state[0]
        assert condition.mask[index].tolist() == [True] * n + [False] * (12 - n)
        close(condition.tokens[index, :n], expected)
        close(condition.pooled[index], expected.mean(dim=0))


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_without_a_mask_padding_counts_in_the_encoder_too(kind: str, tmp_path: Path) -> None:
    model = save_model(kind, tmp_path)
    condition = make("text/hf", folder=str(tmp_path), length=12, mask=False)(TEXTS[:1])
    assert condition.mask is None
    ids = token_ids(TEXTS[0], kind != "t5")
    padded = torch.cat((ids, torch.zeros(1, 12 - ids.shape[1], dtype=torch.long)), dim=1)
    with torch.no_grad():
        expected = model(input_ids=padded, attention_mask=torch.ones_like(padded)).last_hidden_state
    close(condition.tokens, expected)
    close(condition.pooled, expected[:, : ids.shape[1]].mean(dim=1))


def test_penultimate_layer_is_the_output_of_that_block(tmp_path: Path) -> None:
    model = save_model("text", tmp_path)
    condition = make("text/hf", folder=str(tmp_path), length=12, layer="penultimate")(TEXTS[1:2])
    seen = []
    blocks = next(module for name, module in model.named_modules() if name.endswith("encoder.layers"))
    blocks[-2].register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    ids = token_ids(TEXTS[1], True)
    with torch.no_grad():
        model(input_ids=ids)
    close(condition.tokens[0, : ids.shape[1]], seen[0].reshape(-1, 16))


@pytest.mark.parametrize("kind", ["text", "projected", "clip"])
def test_own_pooled_vector_of_clip(kind: str, tmp_path: Path) -> None:
    """The end token after the final norm, projected where the folder says that the model projects it."""
    model = save_model(kind, tmp_path)
    conditioner = make("text/hf", folder=str(tmp_path), length=12, pooled="own")
    condition = conditioner(TEXTS)
    tower = model.text_model if kind == "clip" else model
    for index, text in enumerate(TEXTS):
        with torch.no_grad():
            last = (tower if kind != "projected" else model)(input_ids=token_ids(text, True)).last_hidden_state[0, -1]
            expected = model.text_projection(last) if kind == "projected" else last
        close(condition.pooled[index], expected)
    assert conditioner.pooled_dim == (12 if kind == "projected" else 16)


def test_no_pooled_vector_where_none_is_wanted(tmp_path: Path) -> None:
    save_model("t5", tmp_path)
    conditioner = make("text/hf", folder=str(tmp_path), pooled="none")
    assert conditioner.pooled_dim == 0
    assert conditioner(TEXTS).pooled is None


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it has no config.json"):
        make("text/hf", folder=str(tmp_path / "none"))
    save_model("bert", tmp_path / "bert")
    with pytest.raises(ConfigError, match="has positions for 24 tokens; set length to 24 or less"):
        make("text/hf", folder=str(tmp_path / "bert"))
    save_model("t5", tmp_path / "t5")
    with pytest.raises(ConfigError, match="gives no pooled vector of its own"):
        make("text/hf", folder=str(tmp_path / "t5"), pooled="own")
    state = transformers.T5EncoderModel.from_pretrained(tmp_path / "t5").state_dict()
    name = next(key for key in state if key.endswith("1.layer.0.SelfAttention.q.weight"))
    save_file({k: v.clone() for k, v in state.items() if k != name}, tmp_path / "t5" / "model.safetensors")
    with pytest.raises(DataError, match="1 of its tensors are missing or mis-shaped"):
        make("text/hf", folder=str(tmp_path / "t5"))(["a"])
    (tmp_path / "t5" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        make("text/hf", folder=str(tmp_path / "t5"))(["a"])
    (tmp_path / "t5" / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="config.json"):
        make("text/hf", folder=str(tmp_path / "t5"))


def test_folders_inside_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_weights").mkdir()
    (tmp_path / "some_weights" / "__init__.py").write_text("raise RuntimeError('it was imported')", encoding="utf-8")
    save_model("bert", tmp_path / "some_weights" / "model")
    monkeypatch.syspath_prepend(tmp_path)
    inside = make("text/hf", folder="package:some_weights/model", length=12)
    beside = make("text/hf", folder=str(tmp_path / "some_weights" / "model"), length=12)
    assert torch.equal(inside(TEXTS).tokens, beside(TEXTS).tokens)
    with pytest.raises(DataError, match="it has no config.json"):
        make("text/hf", folder="package:some_weights/other")
    for name in ("other_weights/model", "other_weights", "not a name/model", "/model"):
        with pytest.raises(DataError, match="which is not installed; run 'pip install "):
            make("text/hf", folder=f"package:{name}")


# -------------------------------------------------------------------------------------------------- open_clip


@pytest.fixture(scope="module")
def clip() -> Any:
    torch.manual_seed(0)
    return open_clip.create_model(CLIP).eval()


@pytest.fixture(scope="module")
def clip_file(clip: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("clip") / "both.safetensors"
    save_file({name: tensor.clone() for name, tensor in clip.state_dict().items()}, path)
    return f"file:{path}"


def test_open_clip_agrees_with_open_clip(clip: Any, clip_file: str) -> None:
    seen: dict[str, Tensor] = {}
    hooks = [
        clip.ln_final.register_forward_hook(lambda *a: seen.__setitem__("last", a[2])),
        clip.transformer.resblocks[-2].register_forward_hook(lambda *a: seen.__setitem__("penultimate", a[2])),
    ]
    with torch.no_grad():
        expected = clip.encode_text(open_clip.get_tokenizer(CLIP)(TEXTS))
    for hook in hooks:
        hook.remove()
    for layer in ("last", "penultimate"):
        conditioner = make("text/open_clip", model=CLIP, weights=clip_file, layer=layer)
        condition = conditioner(TEXTS)
        close(condition.pooled, expected)
        close(condition.tokens, seen[layer])
        assert (conditioner.token_dim, conditioner.pooled_dim) == (condition.tokens.shape[2], expected.shape[1])
        # Start, three words, end; seven words; nothing.
        assert condition.mask.sum(dim=1).tolist() == [5, 9, 2]
    assert make("text/open_clip", model=CLIP, weights=clip_file, mask=False)(TEXTS).mask is None


def test_files_of_another_model_are_refused(clip_file: str) -> None:
    with pytest.raises(DataError, match="does not fit the text tower of open_clip's 'ViT-S-32'"):
        make("text/open_clip", model="ViT-S-32", weights=clip_file)(["a"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "ViT-L-41"}, NotFoundError, "open_clip has no model 'ViT-L-41'. Did you mean "),
        ({"model": "ViT-B-16-SigLIP"}, ConfigError, "does not read CLIP's tokens"),
        ({"model": "roberta-ViT-B-32"}, ConfigError, "does not read CLIP's tokens"),
        ({"weights": "openia"}, NotFoundError, "has no weights 'openia' for 'ViT-L-14'. Did you mean 'openai'"),
    ],
)
def test_unknown_models_and_weights_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make("text/open_clip", **options)
    assert message in str(caught.value)


# ---------------------------------------------------------------------------------------------- as a conditioner

RANDOM: dict[str, Any] = {"folder": "random", "length": 40}


def watched(conditioner: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record the texts that reach the encoder."""
    memory = conditioner._encoder()
    seen: list[list[str]] = []
    encode = memory._encode
    monkeypatch.setattr(memory, "_encode", lambda texts: (seen.append(list(texts)), encode(texts))[1])
    return seen


def test_texts_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    conditioner = make("text/hf", **RANDOM)
    seen = watched(conditioner, monkeypatch)
    first = conditioner(["a", "b", "a"])
    again = make("text/hf", **RANDOM)(["b", "c", "a"], torch.tensor([False, False, True]))
    conditioner.null(2, torch.device("cpu"))
    assert seen == [["a", "b"], ["c"], [""]]
    assert torch.equal(again.tokens[0], first.tokens[1])


def test_memory_forgets_the_least_recently_used(monkeypatch: pytest.MonkeyPatch) -> None:
    # A text takes 40 tokens × 32 × 4 bytes, its mask and its pooled vector: 5,288 bytes, so 198 of them fit into a MiB.
    conditioner = make("text/hf", **RANDOM, cache=1)
    seen = watched(conditioner, monkeypatch)
    names = [str(index) for index in range(199)]
    for name in names[:198]:
        conditioner([name])
    conditioner([names[0]])
    conditioner([names[198]])
    seen.clear()
    conditioner([names[0]])
    conditioner([names[2]])
    assert seen == []
    conditioner([names[1]])
    assert seen == [[names[1]]]
    assert conditioner._encoder()._bytes == 198 * 5288


def test_without_memory_every_text_is_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    conditioner = make("text/hf", **RANDOM, cache=0)
    seen = watched(conditioner, monkeypatch)
    assert torch.equal(conditioner(["a", "b"]).tokens, conditioner(["a", "b"]).tokens)
    assert seen == [["a", "b"], ["a", "b"]]


def test_dropped_texts_get_the_condition_of_the_empty_text() -> None:
    conditioner = make("text/hf", **RANDOM)
    mixed = conditioner(["a", "b", "c"], torch.tensor([False, True, False]))
    plain, empty = conditioner(["a", "b", "c"]), conditioner([""])
    for part in ("tokens", "mask", "pooled"):
        got, given, null = (getattr(condition, part) for condition in (mixed, plain, empty))
        assert torch.equal(got, torch.stack((given[0], null[0], given[2])))


@pytest.fixture
def told() -> Iterator[Losses]:
    """What is said of long texts, with nothing said yet."""
    losses.train(False)
    yield losses
    losses.train(False)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Without what libraries say when they are first imported."""
    return [record.getMessage() for record in caplog.records if record.name == "underpaint"]


def test_long_texts_are_cut_and_each_says_what_it_lost(caplog: pytest.LogCaptureFixture, told: Losses) -> None:
    conditioner = make("text/open_clip", model=CLIP, weights="random")
    with caplog.at_level(logging.WARNING, logger="underpaint"):
        first = conditioner(["red " * 90, "a red fox", "fox " * 80])
        make("text/open_clip", model=CLIP, weights="random")(["boat " * 300, "fox " * 80])
    # With start and end, in a context of 77.
    end = " tokens are lost; it starts with "
    start = f"A text is too long for 'text/open_clip' ({CLIP}), and its last "
    assert [message[: len(start) + len(end) + 7] for message in said(caplog)] == [
        f"{start}15{end}'red ",
        f"{start}5{end}'fox f",
        f"{start}225{end}'boa",
    ]
    close(conditioner(["red " * 75]).tokens[0], first.tokens[0])


def test_several_encoders_each_say_what_was_lost(caplog: pytest.LogCaptureFixture, told: Losses) -> None:
    parts = [
        {"name": "text/open_clip", "options": {"model": CLIP, "weights": "random"}},
        {"name": "text/hf", "options": {"folder": "random", "length": 8}, "pooled": False},
    ]
    with caplog.at_level(logging.WARNING, logger="underpaint"):
        make("text/joint", parts=parts)(["fox " * 80])
    assert [f"({CLIP}), and its last 5 tokens" in said(caplog)[0], len(said(caplog))] == [True, 2]
    # 320 bytes and an end, in eight tokens.
    assert "'text/hf' (random), and its last 313 tokens" in said(caplog)[1]


def test_a_training_tells_a_few_long_texts_and_counts_the_others(
    caplog: pytest.LogCaptureFixture, told: Losses, tmp_path: Path
) -> None:
    plugins = manager()
    conditioner = make("text/hf", folder="random", length=8)
    with caplog.at_level(logging.WARNING, logger="underpaint"):
        plugins.call("on_train_start", folder=tmp_path, config={})
        for index in range(50):
            conditioner([f"{index:09}"])
        assert len(said(caplog)) == 3
        assert said(caplog)[2].endswith("starts with '000000002'. Further ones are counted.")
        conditioner(["a" * 20])
        plugins.call("on_stage_end", folder=tmp_path, stage="diffusion", step=5)
        # 47 times nine bytes and an end, in eight tokens; and once twenty bytes.
        (summary,) = said(caplog)[3:]
        assert summary.startswith("Stage 'diffusion': Texts too long for 'text/hf' (random) that were counted: 48, ")
        assert summary.endswith("which lost 107 tokens in all, and 13 at most.")
        caplog.clear()
        for index in range(50, 54):
            conditioner([f"{index:09}"])
        plugins.call("on_train_end", folder=tmp_path, error=None)
        assert [message[:20] for message in said(caplog)] == ["A text is too long f"] * 3 + ["Texts too long for '"]
        caplog.clear()
        for index in range(54, 60):
            conditioner([f"{index:09}"])
    assert len(said(caplog)) == 6


def test_all_captions_of_a_data_set_are_not_told_one_by_one(caplog: pytest.LogCaptureFixture, told: Losses) -> None:
    with caplog.at_level(logging.WARNING, logger="underpaint"):
        for index in range(150):
            told.add("an encoder", str(index), index)
        assert len(said(caplog)) == 100
        told.sum_up()
        told.sum_up()
    (summary,) = said(caplog)[100:]
    assert summary.endswith(f"that were counted: 50, which lost {sum(range(100, 150))} tokens in all, and 149 at most.")


def test_length_of_transformers_texts_is_an_option(caplog: pytest.LogCaptureFixture, told: Losses) -> None:
    with caplog.at_level(logging.WARNING, logger="underpaint"):
        # ByT5 reads bytes and adds an end.
        condition = make("text/hf", folder="random", length=8)(["123456789"])
    assert condition.tokens.shape == (1, 8, 32)
    assert "last 2 tokens are lost" in caplog.text


def test_the_encoder_is_no_part_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    conditioner = make("text/hf", **RANDOM)
    monkeypatch.setattr(type(conditioner), "open", lambda *_: pytest.fail("the encoder was read before any text"))
    another = make("text/hf", **RANDOM, precision="bf16")
    assert not list(another.parameters())
    assert not another.state_dict()
    monkeypatch.undo()
    conditioner(["a"])
    assert not list(conditioner.parameters())
    assert not conditioner.state_dict()


def test_random_weights_are_always_the_same_and_leave_the_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    for options in ({"name": "text/hf", **RANDOM}, {"name": "text/open_clip", "model": CLIP, "weights": "random"}):
        name = options.pop("name")
        values = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            values.append(make(name, **options)(["a red fox"]).tokens)
            gc.collect()
            if seed == 1:
                assert torch.equal(torch.rand(3), expected)
        assert torch.equal(*values)


def test_type_and_device_follow_the_module() -> None:
    conditioner = make("text/hf", **RANDOM).bfloat16()
    condition = conditioner(["a"])
    assert (condition.tokens.dtype, condition.pooled.dtype) == (torch.bfloat16, torch.bfloat16)
    assert condition.mask.dtype == torch.bool
    assert conditioner.to("meta")(["a"]).tokens.is_meta
    assert conditioner.null(2, torch.device("meta")).pooled.shape == (2, 32)


def test_precision_of_the_encoder_is_its_own() -> None:
    """Neither autocast nor the type of the module changes what is remembered; the option does."""
    with torch.autocast("cpu", torch.bfloat16):
        first = make("text/hf", **RANDOM)(["a red fox"])
    gc.collect()
    assert torch.equal(first.tokens, make("text/hf", **RANDOM)(["a red fox"]).tokens)
    low = make("text/hf", **RANDOM, precision="bf16")(["a red fox"])
    assert low.tokens.dtype == torch.float32
    assert 1e-4 < float((low.tokens - first.tokens).abs().max()) < 0.1


def test_pickles_without_the_encoder() -> None:
    conditioner = make("text/open_clip", model=CLIP, weights="random")
    first = conditioner(["a"])
    data = pickle.dumps(conditioner)
    assert len(data) < 20_000
    assert torch.equal(pickle.loads(data)(["a"]).tokens, first.tokens)


def test_labels_are_refused() -> None:
    with pytest.raises(DataError, match="'text/hf' was given labels"):
        make("text/hf", **RANDOM)(torch.tensor([1]))


# ------------------------------------------------------------------------------------------------------- joint

PARTS: dict[str, dict[str, Any]] = {
    "clip": {"name": "text/open_clip", "options": {"model": CLIP, "weights": "random"}},
    "byte": {"name": "text/hf", "options": {**RANDOM, "length": 20}},
}


def test_joint_as_in_stable_diffusion_3() -> None:
    parts = [PARTS["clip"], {**PARTS["clip"], "tokens": "beside"}, {**PARTS["byte"], "pooled": False}]
    conditioner = make("text/joint", parts=parts)
    clip, byte = (make(PARTS[name]["name"], **PARTS[name]["options"])(TEXTS) for name in ("clip", "byte"))
    condition = conditioner(TEXTS)
    width = 2 * clip.tokens.shape[2]
    assert conditioner.token_dim == width == condition.tokens.shape[2]
    assert conditioner.pooled_dim == 2 * clip.pooled.shape[1]
    assert condition.tokens.shape[:2] == (3, 77 + 20)
    assert torch.equal(condition.tokens[:, :77], torch.cat((clip.tokens, clip.tokens), dim=2))
    assert torch.equal(condition.tokens[:, 77:, :32], byte.tokens)
    assert not condition.tokens[:, 77:, 32:].any()
    assert torch.equal(condition.mask, torch.cat((clip.mask, byte.mask), dim=1))
    assert torch.equal(condition.pooled, torch.cat((clip.pooled, clip.pooled), dim=1))


def test_joint_as_in_flux() -> None:
    byte = {**PARTS["byte"]["options"], "mask": False, "pooled": "none"}
    parts = [{**PARTS["clip"], "tokens": "none"}, {"name": "text/hf", "options": byte, "pooled": False}]
    conditioner = make("text/joint", parts=parts)
    condition = conditioner(TEXTS)
    assert (conditioner.token_dim, condition.mask) == (32, None)
    assert torch.equal(condition.tokens, make("text/hf", **byte)(TEXTS).tokens)
    assert torch.equal(condition.pooled, make("text/open_clip", **PARTS["clip"]["options"])(TEXTS).pooled)


def test_joint_mask_where_one_part_hides_nothing() -> None:
    open_part = {"name": "text/hf", "options": {**PARTS["byte"]["options"], "mask": False}}
    condition = make("text/joint", parts=[open_part, PARTS["byte"]])(TEXTS)
    assert condition.mask[:, :20].all()
    assert not condition.mask[:, 20:].all()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "parts is empty"),
        ([{**PARTS["byte"], "tokens": "beside"}], "there is none before"),
        ([{"name": "labels"}], "'labels' is no conditioner of texts"),
        ([{"name": "text/hf", "options": {**RANDOM, "pooled": "none"}}], "gives no pooled vector; write 'pooled: fal"),
        ([{**PARTS["byte"], "tokens": "none", "pooled": False}], "leave out all tokens and pooled"),
        ([{**PARTS["byte"], "tokens": "before"}], "tokens is 'before'"),
    ],
)
def test_joints_that_cannot_be_are_refused(parts: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make("text/joint", parts=parts)


def test_parts_of_other_lengths_cannot_stand_beside_each_other() -> None:
    conditioner = make("text/joint", parts=[PARTS["clip"], {**PARTS["byte"], "tokens": "beside"}])
    with pytest.raises(ConfigError, match=r"\[77, 20\] tokens cannot stand beside"):
        conditioner(["a"])


# ------------------------------------------------------------------------------------------------ in a generator


@pytest.mark.parametrize("name", ["mmdit/d6-2", "flux/B-2"])
def test_conditions_a_backbone(name: str) -> None:
    tiny: dict[str, Any] = {"width": 32, "heads": 4}
    tiny |= {"depth": 2} if name.startswith("mmdit") else {"double": 1, "single": 1, "axes": [2, 2, 4]}
    gc.collect()
    conditioner = make("text/hf", **RANDOM)
    assert isinstance(conditioner, Conditioner)
    dims = {"pooled_dim": conditioner.pooled_dim, "token_dim": conditioner.token_dim}
    backbone: Any = underpaint.create("backbone", name, latent_channels=4, grid=(4, 4), **dims, **tiny)
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([0.2, 0.7])
    with torch.inference_mode():
        conditioner(["a red fox", ""])
    # What was remembered while sampling can be trained with.
    backbone(x, t, conditioner.null(2, torch.device("cpu"))).velocity.sum().backward()
    velocity = backbone(x, t, conditioner(["a red fox", "snow"], torch.tensor([False, True]))).velocity
    velocity.square().sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())
    both = Condition.join(conditioner(["a red fox"]), conditioner.null(1, torch.device("cpu")))
    torch.testing.assert_close(backbone(x, t, both).velocity, velocity, rtol=0, atol=1e-5)


def test_generator_folders_hold_no_encoder(tmp_path: Path, caplog: pytest.LogCaptureFixture, told: Losses) -> None:
    torch.manual_seed(0)
    encoder: Any = underpaint.create("encoder", "tiny/vit@random", width=32, depth=1, heads=2)
    adapter: Any = underpaint.create("adapter", "aligntok/mlp", in_channels=encoder.info.channels, latent_channels=4)
    decoder: Any = underpaint.create(
        "decoder", "ldm/decoder", latent_channels=4, stride=8, base=8, blocks=1, multipliers=[1, 1, 1, 2]
    )
    statistics = LatentStatistics(mean=(0.1,) * 4, std=(2.0,) * 4, count=7, data="abc")
    conditioner = make("text/open_clip", model=CLIP, weights="random")
    dims = {"pooled_dim": conditioner.pooled_dim, "token_dim": conditioner.token_dim}
    backbone: Any = underpaint.create(
        "backbone", "mmdit/d6-1", latent_channels=4, grid=(4, 4), depth=1, width=8, heads=2, table=8, **dims
    )
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(0.1)
    tokenizer = Tokenizer(encoder, adapter, decoder, statistics, {"title": "a test", "size": [32, 32]})
    generator = Generator(tokenizer, backbone, conditioner, grid=(4, 4)).eval()
    save_generator(generator, tmp_path / "g")
    assert all(name.startswith("backbone.") for name in load_file(tmp_path / "g" / "model.safetensors"))
    again = underpaint.load(tmp_path / "g")
    assert torch.equal(again.latents(["snow"], seeds=[1]), generator.latents(["snow"], seeds=[1]))
    prompts = ["--text", "snow " * 80, "--text", "a fox", "--text", "fox " * 90]
    where = ["--out", str(tmp_path / "out"), "--count", "6", "--batch", "2", "--steps", "1", "--device", "cpu"]
    with caplog.at_level(logging.WARNING, logger="underpaint"):
        done = CliRunner().invoke(main, ["sample", str(tmp_path / "g"), *where, *prompts])
    assert done.exit_code == 0, done.output
    assert [message.partition("its last ")[2][:9] for message in said(caplog)] == ["5 tokens ", "15 tokens"]
