"""What a path means, and how a data set is split."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from underpaint import ConfigError, DataError, NotFoundError
from underpaint.config.component import ComponentConfig
from underpaint.data.sources import guess_dataset, open_dataset, split
from underpaint.testing.files import place


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9), "red").save(path)


def empty(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def config(name, **options):
    return ComponentConfig(name=name, options=options)


def test_a_folder_of_images(tmp_path):
    picture(tmp_path / "deep" / "down" / "a.JPEG")
    guessed = guess_dataset(str(tmp_path))
    assert guessed.train == config("files/folder", path=str(tmp_path))
    assert guessed.validation is None
    assert len(open_dataset(guessed.train)) == 1


@pytest.mark.parametrize("held", ["val", "validation", "test"])
def test_folders_named_train_and_val(tmp_path, held):
    picture(tmp_path / "train" / "cats" / "a.png")
    picture(tmp_path / held / "cats" / "b.png")
    guessed = guess_dataset(f"{tmp_path}/")
    assert guessed.train == config("files/folder", path=f"{tmp_path}/train")
    assert guessed.validation == config("files/folder", path=f"{tmp_path}/{held}")


def test_a_slash_at_the_end_makes_no_other_data_set(tmp_path):
    picture(tmp_path / "photos" / "a.png")
    assert guess_dataset(f"{tmp_path}/photos/") == guess_dataset(f"{tmp_path}/photos")


def test_links_to_folders_are_folders(tmp_path):
    for part in ("train", "val"):
        picture(tmp_path / "elsewhere" / part / "a.png")
        (tmp_path / "here" / "loop").mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / part).symlink_to(tmp_path / "elsewhere" / part)
    guessed = guess_dataset(str(tmp_path / "here"))
    assert guessed.validation == config("files/folder", path=f"{tmp_path}/here/val")


def test_links_in_circles_hold_no_images(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(DataError, match="holds only loop"):
        guess_dataset(str(tmp_path))


@pytest.mark.parametrize(("kind", "name"), [("parquet", "files/parquet"), ("tar", "files/webdataset")])
def test_single_files(tmp_path, kind, name):
    place(f"{{{kind}}}", tmp_path)
    [file] = (tmp_path / kind).iterdir()
    for path in (file, file.parent):
        guessed = guess_dataset(str(path))
        assert guessed.train == config(name, path=str(path))
        assert guessed.validation is None
        assert len(open_dataset(guessed.train)) == 6


@pytest.mark.parametrize(("suffix", "name"), [("parquet", "files/parquet"), ("tar", "files/webdataset")])
@pytest.mark.parametrize(
    ("files", "train", "validation"),
    [
        (["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"], "train", "validation"),
        (["train-0", "val-0", "test-0"], "train", "val"),
        (["imagenet1k-train-0000", "imagenet1k-test-00"], "train", "test"),
        (["train", "valid"], "train", "valid"),
    ],
)
def test_splits_are_told_by_names(tmp_path, suffix, name, files, train, validation):
    for file in files:
        empty(tmp_path / f"{file}.{suffix}")
    guessed = guess_dataset(str(tmp_path))
    assert guessed.train == config(name, path=str(tmp_path), split=train)
    assert guessed.validation == config(name, path=str(tmp_path), split=validation)


def test_one_split_only_is_all_there_is(tmp_path):
    empty(tmp_path / "training-pictures.tar")
    empty(tmp_path / "more.tar")
    assert guess_dataset(str(tmp_path)).train == config("files/webdataset", path=str(tmp_path))


def test_the_data_folder_of_a_hugging_face_repository(tmp_path):
    empty(tmp_path / "README.md")
    empty(tmp_path / "data" / "train-00000-of-00001.parquet")
    assert guess_dataset(str(tmp_path)).train == config("files/parquet", path=f"{tmp_path}/data")


def test_class_names_beside_the_files_are_taken(tmp_path):
    empty(tmp_path / "a.tar")
    empty(tmp_path / "classes.json")
    assert guess_dataset(str(tmp_path)).train.options["classes"] == f"{tmp_path}/classes.json"


def test_remote_paths_are_guessed_too(tmp_path):
    picture(tmp_path / "a.png")
    url = f"file://{tmp_path}"
    assert guess_dataset(url).train == config("files/folder", path=url)


@pytest.mark.parametrize(
    ("make", "path", "said"),
    [
        (lambda root: None, "nowhere", "There is no data at '.*nowhere'; give a folder of images"),
        (lambda root: None, "", "The folder '.*' is empty; it should hold images"),
        (lambda root: empty(root / "notes.txt"), "", "holds only notes.txt; it should hold images"),
        (lambda root: empty(root / "sub" / "notes.txt"), "", "holds only sub; it should hold images"),
        (lambda root: empty(root / ".hidden.jpg"), "", "holds only .hidden.jpg; it should hold images"),
        (lambda root: empty(root / "notes.txt"), "notes.txt", r"notes.txt' is neither a .parquet nor a .tar file\.$"),
        (lambda root: picture(root / "a.png"), "a.png", "neither .* Give the folder that it is in"),
        (lambda root: None, "nonsense://bucket/x", "'.*nonsense://bucket/x' cannot be opened|There is no data"),
    ],
)
def test_what_cannot_be_data_is_said_in_one_sentence(tmp_path, make, path, said):
    make(tmp_path)
    with pytest.raises(DataError, match=said):
        guess_dataset(str(tmp_path / path))


def test_unknown_protocols_are_refused():
    with pytest.raises(DataError, match="'nonsense://bucket/x' cannot be opened"):
        guess_dataset("nonsense://bucket/x")


def test_open_dataset_passes_options_and_errors_on():
    assert len(open_dataset(config("scenes/shapes", length=7))) == 7
    with pytest.raises(ConfigError, match="lenght"):
        open_dataset(config("scenes/shapes", lenght=7))
    with pytest.raises(NotFoundError, match="'scenes/shapes'"):
        open_dataset(config("scenes/shape"))


@pytest.mark.parametrize(("count", "holdout", "held"), [(100, 0.05, 5), (1000, 0.2, 200), (3, 0.01, 1), (2, 0.99, 1)])
def test_split_shares_out_every_sample(count, holdout, held):
    dataset = open_dataset(config("scenes/shapes", length=count))
    train, validation = split(dataset, holdout)
    assert len(validation) == held
    assert np.array_equal(np.sort(np.concatenate([train, validation])), np.arange(count))
    assert (np.diff(train) > 0).all()
    assert (np.diff(validation) > 0).all()
    again = split(dataset, holdout)
    assert np.array_equal(again[1], validation)


def test_split_takes_from_everywhere():
    # Samples are often sorted by class: each tenth of the set must lose about a tenth of what is held out.
    _, validation = split(open_dataset(config("scenes/shapes", length=5000)), 0.2)
    counts = np.bincount(validation // 500, minlength=10)
    assert (np.abs(counts - 100) < 5 * np.sqrt(100 * 0.8 * 0.9)).all()


def test_one_sample_cannot_be_split():
    with pytest.raises(DataError, match="1 samples cannot be split"):
        split(open_dataset(config("scenes/shapes", length=1)), 0.5)
