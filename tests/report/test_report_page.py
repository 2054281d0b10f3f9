"""The report of a run, from complete to hardly begun, and damaged."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from underpaint.errors import NotFoundError
from underpaint.evaluation.protocol import Number, write_numbers
from underpaint.report.page import write_report

CONFIG = """\
name: tiny run
about: A tokenizer of <scenes> & more.
data: {train: {name: scenes, count: 100}, size: [16, 24]}
tokenizer: {encoder: tiny/conv@random, adapter: {name: linear}, decoder: tiny/conv, latent_channels: 5}
stages:
- {name: rebuild, trains: [decoder], steps: 40, batch: 8}
- {name: align, trains: [encoder, adapter, decoder], steps: 90, batch: 8}
diffusion: {backbone: {name: sit/tiny}, conditioner: labels, steps: 60, batch: 16}
"""
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 255, (20, 16, 24, 3), dtype=np.uint8)


def rows(stage: str, count: int, **changes) -> list[dict]:
    made = [
        {
            "step": 10 * (i + 1), "loss": 1.0 / (i + 1), "l1": 0.5 / (i + 1), "lr": 1e-4, "lr_decoder": 1e-4,
            "grad_norm": 1.0, "images_per_second": 7.0 if i == 0 else 2345.6, "mfu": 0.4321, "data_wait": 0.025,
            "memory_gib": 1.5 + 0.25 * i, "seconds": 30.0 * (i + 1), "eta": 1.0, "skipped": 0,
        }
        for i in range(count)
    ]  # fmt: skip
    for row in made:
        row.update(changes)
    return made


def write_rows(run: Path, stage: str, lines: list[dict]) -> None:
    folder = run / "stages" / stage
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_run(folder: Path) -> Path:
    run = folder / "Läufe & <more>" / "run 1"
    for name in ("samples", "report"):
        (run / name).mkdir(parents=True)
    (run / "config.yaml").write_text(CONFIG)
    (run / "provenance.json").write_text(
        json.dumps(
            {
                "versions": {"torch": "2.x"},
                "seed": 3,
                "sessions": [
                    {"started": "2026-01-02T03:04:05+00:00", "ranks": 2, "device": "cpu"},
                    {
                        "started": "2026-01-02T04:04:05+00:00",
                        "ended": "2026-01-02T05:06:07+00:00",
                        "ranks": 4,
                        "device": "cuda",
                    },
                ],
            }
        )
    )
    write_rows(run, "rebuild", rows("rebuild", 4))
    write_rows(run, "align", rows("align", 9))
    write_rows(run, "diffusion", [{k: v for k, v in row.items() if k != "l1"} for row in rows("diffusion", 6)])
    np.savez(
        run / "samples" / "reconstructions.npz",
        originals=IMAGES, reconstructions=IMAGES // 2, reconstructions_rebuild=IMAGES // 3,
        reconstructions_align=IMAGES // 2, latents=RNG.standard_normal((20, 5, 4, 6)).astype(np.float32),
    )  # fmt: skip
    np.savez(
        run / "samples" / "samples.npz", images=IMAGES[:6], labels=np.array([0, 1, 2, 0, 1, 5]),
        classes=np.array(["red fox", "<b>owl</b>", "Äpfel"]),
    )  # fmt: skip
    protocol = {"metric": "psnr", "images": 500, "extractor": {"name": "none", "weights": None}, "levels": True}
    numbers = [
        Number(name="psnr", value=23.45678, protocol=protocol),
        Number(name="gFD", value=0.00123456, std=1e-4, protocol={}),
    ]
    write_numbers(run / "report" / "numbers.json", numbers)
    (run / "report" / "notes.json").write_text(json.dumps(["Nothing was trained on <validation> images."]))
    return run


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Page:
    """The page of a complete run, for the tests that change nothing."""
    return page(make_run(tmp_path_factory.mktemp("complete")))


class Page(HTMLParser):
    """Checks nesting, and collects what a reader sees and what a browser would fetch."""

    VOID = ("meta", "img", "br", "hr", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.raw = text
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, str]] = []
        self.ids: list[str] = []
        self.tags: dict[str, int] = {}
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.seen).split())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.links += [
            values[k] for k in ("src", "href", "xlink:href", "srcset", "action", "data", "poster") if k in values
        ]
        self.ids += [values["id"]] if "id" in values else []
        if tag == "img":
            self.images.append(values)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.seen.append(data)


def page(run: Path) -> Page:
    path = write_report(run)
    assert path == run / "report" / "index.html"
    return Page(path.read_text(encoding="utf-8"))


def decoded(image: dict[str, str]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))))


def test_the_page_stands_alone(complete):
    assert all(link.startswith(("data:image/", "#")) for link in complete.links)
    assert not {"script", "link", "iframe", "object", "base"} & complete.tags.keys()
    assert "@import" not in complete.raw
    assert "url(http" not in complete.raw
    assert len(complete.ids) == len(set(complete.ids))
    targets = {link[1:] for link in complete.links if link.startswith("#")}
    assert targets <= set(complete.ids)


def test_it_tells_what_was_trained_on_what(complete):
    text = complete.text
    for sentence in (
        "tiny run",
        "A tokenizer of <scenes> & more.",
        "Nothing was trained on <validation> images.",
        "Images: scenes, cropped to 16×24 pixels.",
        "Tokenizer: encoder tiny/conv@random, adapter linear, decoder tiny/conv, 5 latent channels.",
        "Stage rebuild trained the decoder for 40 steps of 8 images.",
        "Stage align trained the encoder, adapter and decoder for 90 steps of 8 images.",
        "Stage diffusion trained sit/tiny with conditioner labels for 60 steps of 16 images.",
        "2026-01-02 03:04 UTC to 2026-01-02 05:06 UTC, 2 sessions, 4 × cuda",
    ):
        assert sentence in text
    assert text.index("Nothing was trained") < text.index("Images: scenes")
    assert "No " not in text


def test_numbers_carry_their_protocol(complete):
    text = complete.text
    assert re.search(r"psnr 23\.46 protocol [0-9a-f]{12} metric psnr images 500", text)
    assert "extractor.weights none levels yes" in text
    assert "gFD 0.001235 ± 0.00010" in text


def test_pictures_are_those_of_the_run(complete):
    images = complete.images
    shown = [image for image in images if image["alt"] in ("original", "after rebuild", "reconstruction", "latent")]
    # After the last stage comes the finished tokenizer: shown once.
    assert [image["alt"] for image in shown[:4]] == ["original", "after rebuild", "reconstruction", "latent"]
    assert len(shown) == 4 * 20
    assert "after align" not in {image["alt"] for image in images}
    assert (decoded(shown[4]) == IMAGES[1]).all()
    assert (decoded(shown[5]) == IMAGES[1] // 3).all()
    assert (decoded(shown[6]) == IMAGES[1] // 2).all()
    latent = decoded(shown[7])
    assert latent.shape == (16, 24, 3)
    assert (latent == latent[::4, ::4].repeat(4, 0).repeat(4, 1)).all()
    names = [image["alt"] for image in images[-6:]]
    assert names == ["red fox", "<b>owl</b>", "Äpfel", "red fox", "<b>owl</b>", "class 5"]
    assert (decoded(images[-1]) == IMAGES[5]).all()


def test_large_photographs_are_jpeg_and_lossless_beside_the_page(run):
    big = RNG.integers(0, 255, (2, 128, 128, 3), dtype=np.uint8)
    np.savez(run / "samples" / "samples.npz", images=big, labels=np.array([0, 1]))
    images = page(run).images
    assert [image["src"].split(";")[0] for image in images[-2:]] == ["data:image/jpeg"] * 2
    sheet = np.asarray(Image.open(run / "report" / "figures" / "samples.png"))
    assert (sheet[:, :128] == big[0]).all()


def test_speed_table(complete):
    text = complete.text
    # Median without the warm-up row, largest memory, last clock.
    assert "rebuild 2,346 43.2 % 2.5 % 2.25 GiB 2 min 00 s" in text
    assert "FLOP = 2 MAC, forward and backward = 3 forward, recomputation not counted" in text


def test_speed_of_a_resumed_stage_and_of_a_machine_without_a_known_peak(run):
    lines = rows("align", 4)
    for line, seconds in zip(lines, (100.0, 4000.0, 50.0, 3500.0), strict=True):
        line |= {"seconds": seconds, "mfu": float("nan")}
        del line["memory_gib"]
    write_rows(run, "align", lines)
    assert "align 2,346 – 2.5 % – 2 h 05 min" in page(run).text


def test_curves(complete):
    assert complete.tags["svg"] == 2 + 2 + 1
    for title in ("rebuild: loss terms", "align: loss", "diffusion: loss"):
        assert title in complete.text
    assert (
        complete.text.index("rebuild: loss")
        < complete.text.index("align: loss")
        < complete.text.index("diffusion: loss")
    )
    for name in ("grad_norm", "images_per_second", "lr_decoder", "eta"):
        assert name not in complete.text


def test_losses_that_are_not_finite_and_terms_that_start_late(run):
    lines = rows("align", 9)
    lines[2]["loss"] = float("nan")
    lines[5]["loss"] = None
    lines[5]["l1"] = float("inf")
    for line in lines[6:]:
        line["gan"] = -0.5
    write_rows(run, "align", lines)
    text = page(run).text
    assert "Stage align: 2 logged steps have a loss that is not finite" in text
    assert "Stage rebuild:" not in text


def test_a_stage_with_a_single_term_has_one_curve(run):
    lines = rows("diffusion", 6)
    for line in lines:
        line["velocity"] = line["loss"]
        del line["l1"]
    write_rows(run, "diffusion", lines)
    assert page(run).tags["svg"] == 5


def test_markdown_tells_the_same_and_its_pictures_exist(run):
    write_report(run)
    text = (run / "report" / "report.md").read_text(encoding="utf-8")
    assert "Stage rebuild trained the decoder for 40 steps of 8 images." in text
    assert "| psnr | 23.46 | metric: psnr; images: 500;" in text
    assert "| rebuild | 2,346 | 43.2 % | 2.5 % | 2.25 GiB | 2 min 00 s |" in text
    linked = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert {"figures/reconstructions.png", "figures/samples.png", "figures/align-loss.svg"} <= set(linked)
    assert {path.name for path in (run / "report" / "figures").iterdir()} == {Path(link).name for link in linked}


def test_only_the_report_is_written_and_writing_again_gives_the_same(run):
    def others() -> dict[Path, bytes]:
        made = {"index.html", "report.md", "figures"}
        return {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and not made & set(p.relative_to(run).parts)}

    before = others()
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert others() == before
    assert not list(run.rglob("*.tmp"))


# --- runs that are not complete ---


def test_a_run_that_ended_after_a_stage(run):
    shutil.rmtree(run / "stages" / "diffusion")
    (run / "samples" / "samples.npz").unlink()
    (run / "report" / "numbers.json").unlink()
    html = page(run)
    assert "No samples: the run ended after stage align." in html.text
    assert "No numbers: nothing has been measured." in html.text
    assert not {"numbers", "samples"} & set(html.ids)
    assert "#samples" not in html.links


def test_a_recipe_without_diffusion(run):
    (run / "config.yaml").write_text(CONFIG[: CONFIG.index("diffusion")])
    (run / "samples" / "samples.npz").unlink()
    assert "No samples: the recipe ends with the tokenizer." in page(run).text


def test_a_run_that_stopped_within_a_stage(run):
    write_rows(run, "align", rows("align", 3))
    assert "for 30 of 90 steps of 8 images" in page(run).text


def test_an_empty_folder(tmp_path):
    html = page(tmp_path)
    for sentence in (
        "No recipe: the run folder has no config.yaml.",
        "No loss curves: no stage has logged a step.",
        "No reconstructions: no stage has logged a step.",
        "No samples: no stage has logged a step.",
        "No numbers: nothing has been measured.",
        "No provenance:",
    ):
        assert sentence in html.text
    assert tmp_path.name in html.text


def test_no_folder(tmp_path):
    with pytest.raises(NotFoundError, match="There is no run folder"):
        write_report(tmp_path / "nowhere")


DAMAGED = {
    "config.yaml": ("a: [", "The recipe is left out"),
    "provenance.json": ("{", "No provenance"),
    "report/numbers.json": ("[]", "The numbers are left out"),
    "samples/samples.npz": ("PK", "The samples are left out: samples/samples.npz cannot be read"),
    "samples/reconstructions.npz": ("", "The reconstructions are left out: samples/reconstructions.npz cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_leaves_its_part_out_and_says_so(run, name):
    content, sentence = DAMAGED[name]
    (run / name).write_text(content)
    assert sentence in page(run).text


@pytest.mark.parametrize("sessions", ["3", "{}", "[4]"])
def test_sessions_that_are_none_are_left_out(run, sessions):
    (run / "provenance.json").write_text(f'{{"sessions": {sessions}}}')
    assert page(run).text


@pytest.mark.parametrize("cut", [0.3, 0.9, 0.999])
def test_a_picture_file_cut_short(run, cut):
    path = run / "samples" / "samples.npz"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    assert "The samples are left out" in page(run).text


def test_picture_files_that_hold_something_else(run):
    np.savez(run / "samples" / "samples.npz", images=np.zeros((2, 4, 4)))
    np.savez(run / "samples" / "reconstructions.npz", originals=IMAGES, reconstructions=IMAGES[:3])
    text = page(run).text
    assert "samples.npz holds no N×H×W×3 bytes named 'images'" in text
    assert "The reconstructions are left out" in text


def test_pictures_without_latents_labels_or_names(run):
    np.savez(run / "samples" / "reconstructions.npz", originals=IMAGES, reconstructions=IMAGES)
    np.savez(run / "samples" / "samples.npz", images=IMAGES[:2])
    html = page(run)
    assert "No latent pictures" in html.text
    assert [image["alt"] for image in html.images[:2]] == ["original", "reconstruction"]  # equal, yet both are shown
    assert [image["alt"] for image in html.images[-2:]] == ["sample", "sample"]
    np.savez(run / "samples" / "samples.npz", images=IMAGES[:2], labels=np.array([3, 4]))
    assert [image["alt"] for image in page(run).images[-2:]] == ["class 3", "class 4"]


def test_a_log_with_a_torn_last_line_and_a_repeated_step(run):
    path = run / "stages" / "align" / "metrics.jsonl"
    again = json.dumps({"step": 90, "loss": 123.0})
    path.write_text(path.read_text() + again + '\n{"step": 100, "lo')
    html = page(run)
    assert "for 90 steps" in html.text


def test_stages_that_the_recipe_does_not_name(run):
    write_rows(run, "extra", rows("extra", 2))
    text = page(run).text
    assert "Stage extra ran 20 steps." in text
    assert "extra 2,346" in text  # of two log lines the first is warm-up
