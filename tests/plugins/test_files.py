"""Folders, Parquet and WebDataset tars: the same pictures give the same samples; damage is named."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from underpaint import BrokenImageError, ConfigError, DataError, create
from underpaint.data.loader import ImagePass
from underpaint.data.sources import guess_dataset, open_dataset
from underpaint.data.transforms import Crop
from underpaint_files import storage

CLASSES = ("ant", "bee", "cow")
FORMATS = ("files/folder", "files/parquet", "files/webdataset")


def picture(index, side=16):
    """Bytes of a PNG, of another size for each index."""
    pixels = np.random.default_rng(index).integers(0, 256, (side + index, side + 2 * index, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue(), pixels


def write_tar(path, members, mark=True, **options):
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        end = archive.offset
    if not mark:
        os.truncate(path, end)


def rows(count, **columns):
    table = {
        "image": [{"bytes": picture(i)[0], "path": f"{i}.png"} for i in range(count)],
        "label": [i % 3 for i in range(count)],
        "text": [f"a {CLASSES[i % 3]}" for i in range(count)],
    }
    return pa.table({name: value for name, value in {**table, **columns}.items() if value is not None})


@pytest.fixture
def same(tmp_path):
    """The same 9 pictures in the three formats, in two files where there are files."""
    for i in range(9):
        path = tmp_path / "files/folder" / CLASSES[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i)[0])
    for name in FORMATS[1:]:
        (tmp_path / name).mkdir()
    names = json.dumps(CLASSES)
    (tmp_path / "classes.json").write_text(names)
    table = rows(9)
    pq.write_table(table[:5], tmp_path / "files/parquet/a.parquet", row_group_size=2)
    pq.write_table(table[5:], tmp_path / "files/parquet/b.parquet", row_group_size=3)
    members = [
        member
        for i in range(9)
        for member in (
            (f"./{i:04d}.png", picture(i)[0]),
            (f"./{i:04d}.cls", f"{i % 3}\n".encode()),
            (f"./{i:04d}.txt", f"a {CLASSES[i % 3]}".encode()),
        )
    ]
    write_tar(tmp_path / "files/webdataset/a.tar", members[:15])
    write_tar(tmp_path / "files/webdataset/b.tar", members[15:])
    return {
        "files/folder": {"path": str(tmp_path / "files/folder")},
        "files/parquet": {"path": str(tmp_path / "files/parquet"), "classes": str(tmp_path / "classes.json")},
        "files/webdataset": {"path": str(tmp_path / "files/webdataset"), "classes": str(tmp_path / "classes.json")},
    }


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_pictures_give_the_same_samples(same, name):
    dataset = create("dataset", name, **same[name])
    assert len(dataset) == 9
    assert dataset.classes == CLASSES
    assert dataset.has_text == (name != "files/folder")
    order = sorted(range(9), key=lambda i: i % 3) if name == "files/folder" else range(9)
    for index, i in enumerate(order):
        sample = dataset[index]
        assert np.array_equal(sample.image, picture(i)[1])
        assert sample.label == i % 3
        assert sample.text == (f"a {CLASSES[i % 3]}" if dataset.has_text else None)
    assert len({dataset[i].key for i in range(9)}) == 9


@pytest.mark.parametrize("name", FORMATS)
def test_urls_are_paths(same, name):
    by_path = create("dataset", name, **same[name])
    by_url = create("dataset", name, **{**same[name], "path": "file://" + same[name]["path"]})
    assert np.array_equal(by_url[4].image, by_path[4].image)
    assert by_url.fingerprint() == by_path.fingerprint()


@pytest.mark.parametrize("name", FORMATS)
def test_memory_file_system_stands_for_remote_ones(same, name):
    remote = fsspec.filesystem("memory")
    root = Path(same[name]["path"])
    try:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                remote.pipe_file(f"/bucket/{path.relative_to(root)}", path.read_bytes())
        here, there = create("dataset", name, **same[name]), create("dataset", name, path="memory://bucket")
        assert [there[i].key for i in range(9)] == [here[i].key for i in range(9)]
        assert np.array_equal(there[7].image, here[7].image)
    finally:
        remote.rm("/bucket", recursive=True)


@pytest.mark.parametrize("name", FORMATS)
def test_a_used_data_set_can_be_pickled(same, name):
    dataset = create("dataset", name, **same[name])
    _ = dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(copy[8].image, dataset[8].image)
    assert len(pickle.dumps(dataset)) < 4000  # no cached pixels, no open files


@pytest.mark.parametrize("name", FORMATS)
def test_the_fingerprint_follows_names_and_sizes(same, name):
    before = create("dataset", name, **same[name]).fingerprint()
    [first, *_] = sorted(path for path in Path(same[name]["path"]).rglob("*") if path.is_file())
    os.utime(first, (1, 1))
    assert create("dataset", name, **same[name]).fingerprint() == before
    first.rename(first.with_stem(first.stem + "0"))
    assert create("dataset", name, **same[name]).fingerprint() != before


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("index", [-1, 9])
def test_positions_outside_are_index_errors(same, name, index):
    with pytest.raises(IndexError, match=f"9 samples; {index}"):
        create("dataset", name, **same[name])[index]


@pytest.mark.parametrize("name", FORMATS)
def test_mixed_sizes_make_batches(same, name):
    [batch] = ImagePass(create("dataset", name, **same[name]), transform=Crop(20, 20), batch=9)
    assert batch.images.shape == (9, 20, 20, 3)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("path", ["nowhere", "notes.txt"])
def test_a_path_without_images_is_a_data_error(tmp_path, name, path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=path):
        create("dataset", name, path=str(tmp_path / path))


@pytest.mark.parametrize("name", FORMATS)
def test_an_empty_folder_is_a_data_error(tmp_path, name):
    with pytest.raises(DataError, match="There are no"):
        create("dataset", name, path=str(tmp_path))


@pytest.mark.parametrize("name", FORMATS)
def test_misspelt_options_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="pfad"):
        create("dataset", name, pfad=str(tmp_path))


# ------------------------------------------------------------------------------------------ folder


def folder(root, *names):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number)[0])
    return create("dataset", "files/folder", path=str(root))


def test_a_flat_folder_has_no_labels(tmp_path):
    dataset = folder(tmp_path, "b.PNG", "a.png", ".c.png")
    assert dataset.classes == ()
    assert [dataset[i].key for i in range(len(dataset))] == ["a.png", "b.PNG"]
    assert dataset[0].label is None


def test_nested_folders_belong_to_the_first(tmp_path):
    dataset = folder(tmp_path, "zoo/x/y/1.png", "zoo/2.png", "ärger mit Leerzeichen/3.png", "zoo/x/notes.txt")
    assert dataset.classes == ("zoo", "ärger mit Leerzeichen")
    assert [(dataset[i].key, dataset[i].label) for i in range(3)] == [
        ("zoo/2.png", 0),
        ("zoo/x/y/1.png", 0),
        ("ärger mit Leerzeichen/3.png", 1),
    ]


def test_linked_class_folders_are_followed(tmp_path):
    folder(tmp_path / "all", "cat/1.png", "dog/2.png")
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "cat").symlink_to(tmp_path / "all" / "cat")
    (tmp_path / "some" / "again").symlink_to(tmp_path / "some")
    dataset = create("dataset", "files/folder", path=str(tmp_path / "some"))
    assert dataset.classes == ("cat",)
    assert dataset[0].key == "cat/1.png"


def test_images_beside_class_folders_are_an_error(tmp_path):
    with pytest.raises(DataError, match=r"images such as 'stray.png' beside class folders"):
        folder(tmp_path, "cat/1.png", "stray.png")


def test_other_extensions_can_be_chosen(tmp_path):
    folder(tmp_path, "a.png", "b.picture")
    dataset = create("dataset", "files/folder", path=str(tmp_path), extensions=[".picture"])
    assert [dataset[i].key for i in range(len(dataset))] == ["b.picture"]


def test_broken_and_missing_images_are_counted_not_fatal(tmp_path):
    dataset = folder(tmp_path, "a.png", "b.png", "c.png", "d.png")
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "c.png").unlink()
    with pytest.raises(BrokenImageError, match=r"b.png: the file is empty"):
        _ = dataset[1]
    with pytest.raises(BrokenImageError, match=r"c.png: the file is gone"):
        _ = dataset[2]
    read = ImagePass(dataset, transform=Crop(8, 8), batch=4)
    assert [batch.keys for batch in read] == [("a.png", "d.png")]
    assert read.broken == 2


# ------------------------------------------------------------------------------------------ parquet


def parquet(path, table, **options):
    pq.write_table(table, path, row_group_size=2)
    return create("dataset", "files/parquet", path=str(path), **options)


def test_class_names_of_hugging_face_are_taken(tmp_path):
    features = {"label": {"_type": "ClassLabel", "names": list(CLASSES)}}
    table = rows(4).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    assert parquet(tmp_path / "a.parquet", table).classes == CLASSES


@pytest.mark.parametrize("statistics", [True, False])
def test_without_names_the_numbers_are_the_names(tmp_path, statistics):
    pq.write_table(rows(5), tmp_path / "a.parquet", write_statistics=statistics)
    assert create("dataset", "files/parquet", path=str(tmp_path)).classes == ("0", "1", "2")


@pytest.mark.parametrize(
    "names",
    [["ant", "bee", "cow"], [{"name": "bee", "label": 1}, {"name": "cow", "label": 2}, {"name": "ant", "label": 0}]],
)
def test_class_names_of_a_file_are_taken(tmp_path, names):
    (tmp_path / "names.json").write_text(json.dumps(names))
    assert parquet(tmp_path / "a.parquet", rows(4), classes=str(tmp_path / "names.json")).classes == CLASSES


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no file of class names"),
        ("[", "is not JSON"),
        ("{}", "must be a list of names"),
        ('[{"name": "a", "label": 1}, {"name": "b", "label": 1}]', "not the numbers 0 to 1"),
    ],
)
def test_a_bad_file_of_class_names_is_an_error(tmp_path, content, said):
    if content is not None:
        (tmp_path / "names.json").write_text(content)
    with pytest.raises(DataError, match=said):
        parquet(tmp_path / "a.parquet", rows(4), classes=str(tmp_path / "names.json"))


def test_a_label_without_a_name_is_an_error(tmp_path):
    (tmp_path / "names.json").write_text('["ant", "bee"]')
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="have labels up to 2, and there are names for 2 classes only"):
        parquet(tmp_path / "a.parquet", rows(4), classes=str(tmp_path / "names.json"))
    # Without statistics it is not worth reading all labels: the sample itself is refused.
    pq.write_table(rows(4), tmp_path / "b" / "a.parquet", write_statistics=False)
    dataset = create("dataset", "files/parquet", path=str(tmp_path / "b"), classes=str(tmp_path / "names.json"))
    assert dataset[1].label == 1
    with pytest.raises(DataError, match=r"'a.parquet:2' has label 2, and there are names for 2 classes"):
        _ = dataset[2]


def test_columns_can_have_other_names_and_forms(tmp_path):
    table = pa.table(
        {"jpg": [picture(0)[0]], "kind": pa.array([4], pa.int32()), "said": pa.array(["hi"], pa.large_string())}
    )
    dataset = parquet(tmp_path / "a.parquet", table, image="jpg", label="kind", text="said")
    assert np.array_equal(dataset[0].image, picture(0)[1])
    assert (dataset[0].label, dataset[0].text) == (4, "hi")
    bare = parquet(tmp_path / "a.parquet", table, image="jpg")
    assert (bare[0].label, bare[0].text, bare.classes, bare.has_text) == (None, None, (), False)
    off = parquet(tmp_path / "b.parquet", rows(2), label=None, text=None)
    assert (off[0].label, off[0].text, off.classes, off.has_text) == (None, None, (), False)


@pytest.mark.parametrize(
    ("columns", "options", "said"),
    [
        ({"image": None}, {}, "no column 'image'; it has label, text"),
        ({}, {"text": "caption"}, "no column 'caption'; it has image, label, text"),
        ({"label": ["x", "y"]}, {}, "'label' .* holds string, not class indices"),
        ({"text": [1, 2]}, {}, "'text' .* holds int64, not captions"),
        ({"image": ["a.png", "b.png"]}, {}, "'image' .* holds string, not the bytes"),
    ],
)
def test_wrong_columns_are_errors(tmp_path, columns, options, said):
    with pytest.raises(DataError, match=said):
        parquet(tmp_path / "a.parquet", rows(2, **columns), **options)


def test_unlabelled_test_splits_have_no_labels(tmp_path):
    dataset = parquet(tmp_path / "a.parquet", rows(2, label=[-1, -1]))
    assert dataset.classes == ()
    assert dataset[1].label is None


def test_a_row_without_bytes_is_broken(tmp_path):
    dataset = parquet(
        tmp_path / "a.parquet", rows(2, image=[{"bytes": None, "path": "x"}, {"bytes": b"", "path": "y"}])
    )
    with pytest.raises(BrokenImageError, match=r"a.parquet:0: the row has no image bytes"):
        _ = dataset[0]
    with pytest.raises(BrokenImageError, match=r"a.parquet:1: the file is empty"):
        _ = dataset[1]


def test_files_of_other_tables_are_refused(tmp_path):
    pq.write_table(rows(2), tmp_path / "a.parquet")
    pq.write_table(rows(2, label=None), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet' has other columns"):
        create("dataset", "files/parquet", path=str(tmp_path))


@pytest.mark.parametrize("cache", [1, 64])
def test_row_groups_are_cached_up_to_the_limit(tmp_path, monkeypatch, cache):
    big = [{"bytes": bytes([i]) * 400_000, "path": ""} for i in range(8)]
    dataset = parquet(tmp_path / "a.parquet", rows(8, image=big), cache=cache)
    reads = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **options: reads.append(i) or original(self, i, **options)
    )
    for index in (0, 1, 7, 6, 0, 7):
        with pytest.raises(BrokenImageError):
            _ = dataset[index]
    assert reads == ([0, 3, 0, 3] if cache == 1 else [0, 3])  # a row group of two is 800 kB


@pytest.mark.parametrize("keep", [0, 100, -30])
def test_a_truncated_file_is_an_error(tmp_path, keep):
    path = tmp_path / "a.parquet"
    pq.write_table(rows(4), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"a.parquet' is truncated or not a Parquet file"):
        create("dataset", "files/parquet", path=str(path))


def test_a_damaged_row_group_is_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    dataset = parquet(path, rows(4))
    data = path.read_bytes()
    path.write_bytes(b"\xff" * 3000 + data[3000:])
    with pytest.raises(DataError, match=r"Row group 0 of '.*a.parquet' is damaged"):
        _ = dataset[0]


@pytest.mark.parametrize(("suffix", "name"), [("parquet", "files/parquet"), ("tar", "files/webdataset")])
def test_splits_and_globs_choose_files(tmp_path, suffix, name):
    for number, file in enumerate(["train-0", "train-1", "val-0"]):
        if suffix == "parquet":
            pq.write_table(rows(2 + number), tmp_path / f"{file}.parquet")
        else:
            write_tar(tmp_path / f"{file}.tar", [(f"{i}.png", picture(i)[0]) for i in range(2 + number)])

    def count(**options):
        return len(create("dataset", name, **options))

    assert count(path=str(tmp_path), split="train") == 5
    assert count(path=str(tmp_path), split="val") == 4
    assert count(path=f"{tmp_path}/*-0.{suffix}") == 6
    with pytest.raises(DataError, match="splits train, val; choose one with 'split'"):
        count(path=str(tmp_path))
    with pytest.raises(DataError, match="no files of split 'test'; it has train, val"):
        count(path=str(tmp_path), split="test")


# ------------------------------------------------------------------------------------------ webdataset


def webdataset(path, members, **options):
    write_tar(path, members)
    return create("dataset", "files/webdataset", path=str(path), **options)


JPG = picture(1)[0]


def test_captions_may_be_in_json(tmp_path):
    said = json.dumps({"caption": " a bee ", "width": 3}).encode()
    dataset = webdataset(tmp_path / "a.tar", [("1.jpg", JPG), ("1.json", said)])
    assert dataset[0].text == "a bee"
    plain = webdataset(tmp_path / "b.tar", [("1.jpg", JPG), ("1.json", b'{"width": 3}')])
    assert not plain.has_text
    both = webdataset(tmp_path / "c.tar", [("1.jpg", JPG), ("1.json", said), ("1.txt", b"an ant")])
    assert both[0].text == "an ant"


def test_keys_have_folders_and_dots(tmp_path):
    dataset = webdataset(
        tmp_path / "a.tar", [("x/1.seg.png", b"no"), ("x/1.jpg", JPG), ("y/1.jpg", JPG), ("y/2.json", b"")]
    )
    assert [dataset[i].key for i in range(len(dataset))] == ["a.tar/x/1", "a.tar/y/1"]


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_are_read(tmp_path, tar_format):
    stem = "very/" * 60 + "ü" * 50
    write_tar(
        tmp_path / "a.tar",
        [(f"{stem}.jpg", JPG), (f"{stem}.cls", b"2"), ("b.jpg", JPG), ("b.cls", b"1")],
        format=tar_format,
    )
    dataset = create("dataset", "files/webdataset", path=str(tmp_path))
    assert [dataset[i].key for i in range(2)] == [f"a.tar/{stem}", "a.tar/b"]
    assert [dataset[i].label for i in range(2)] == [2, 1]


def test_folders_in_a_tar_are_passed_over(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "1.jpg").write_bytes(JPG)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "in", arcname=".")
    assert create("dataset", "files/webdataset", path=str(tmp_path / "a.tar"))[0].key == "a.tar/deep/1"


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("1.cls", b"1")], r"no \.jpg.* members"),
        ([("1.jpg", JPG), ("1.cls", b"cat")], "The .cls of '1' .* holds b'cat', not a class index"),
        ([("1.jpg", JPG), ("1.cls", b"-1")], "holds b'-1', not a class index"),
        ([("1.jpg", JPG), ("1.png", JPG)], "'1' .* has two members of kind image"),
        ([("1.jpg", JPG), ("1.cls", b"1"), ("2.jpg", JPG)], "1 of 2 samples have no class index .* 'a.tar/2'"),
        ([("1.jpg", JPG), ("1.txt", b"x"), ("2.jpg", JPG)], "1 of 2 samples have no caption, such as 'a.tar/2'"),
    ],
)
def test_bad_samples_are_errors(tmp_path, members, said):
    with pytest.raises(DataError, match=said):
        webdataset(tmp_path / "a.tar", members)


MEMBERS = [(f"{i}.{kind}", data) for i in range(4) for kind, data in (("jpg", JPG), ("cls", b"1"))]


@pytest.mark.parametrize("kept", [3, 5])
def test_a_tar_cut_within_a_member_says_where(tmp_path, kept):
    path = tmp_path / "a.tar"
    write_tar(path, MEMBERS[:kept], mark=False)
    os.truncate(path, path.stat().st_size - 1024)
    with pytest.raises(DataError, match=rf"ends within member '{MEMBERS[kept - 1][0]}'; {kept // 2} samples before"):
        create("dataset", "files/webdataset", path=str(path))


def test_a_tar_cut_between_members_is_not_taken_for_whole(tmp_path):
    write_tar(tmp_path / "a.tar", MEMBERS[:6], mark=False)
    with pytest.raises(DataError, match=r"ends without an end mark after member '2.cls'; 2 samples"):
        create("dataset", "files/webdataset", path=str(tmp_path))


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "empty or cut off"), (b"PK" * 600, "not an uncompressed tar file")]
)
def test_what_is_no_tar_is_an_error(tmp_path, content, said):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=said):
        create("dataset", "files/webdataset", path=str(tmp_path))


def test_a_compressed_tar_is_an_error(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        archive.add(__file__, "x.py")
    with pytest.raises(DataError, match="not an uncompressed tar file"):
        create("dataset", "files/webdataset", path=str(tmp_path))


# ------------------------------------------------------------------------------------------ remote storage


class Flaky(LocalFileSystem):
    """Fails some times, or sends too little, before it works."""

    protocol = "flaky"

    def __init__(self, failures, error=None):
        super().__init__()
        self.failures, self.error, self.calls = failures, error, 0

    def cat_file(self, path, start=None, end=None, **options):
        self.calls += 1
        data = super().cat_file(path, start, end, **options)
        if self.calls > self.failures:
            return data
        if self.error is not None:
            raise self.error
        return data[:-1]


@pytest.fixture
def naps(monkeypatch):
    taken = []
    monkeypatch.setattr(storage.time, "sleep", taken.append)
    return taken


@pytest.mark.parametrize("error", [OSError("503 Slow Down"), TimeoutError("30 s"), None])
def test_remote_reads_are_tried_again_with_growing_pauses(tmp_path, naps, error):
    (tmp_path / "a").write_bytes(b"0123456789")
    fs = Flaky(3, error)
    assert storage.read(fs, str(tmp_path / "a"), 2, 6) == b"2345"
    assert len(naps) == 3
    assert all(0.25 * 2**n <= nap <= 2**n for n, nap in enumerate(naps, 1))


@pytest.mark.parametrize(
    ("error", "said"), [(OSError("503 Slow Down"), "OSError: 503 Slow Down"), (None, "3 bytes came of 4")]
)
def test_the_error_names_place_and_attempts(tmp_path, naps, error, said):
    (tmp_path / "a").write_bytes(b"0123456789")
    with pytest.raises(DataError, match=rf"'flaky://.*a' could not be read in 4 attempt\(s\) \({said}\)"):
        storage.read(Flaky(99, error), str(tmp_path / "a"), 2, 6)


def test_a_missing_file_is_not_asked_for_again(tmp_path, naps):
    fs = Flaky(0)
    with pytest.raises(FileNotFoundError):
        storage.read(fs, str(tmp_path / "nothing"))
    assert fs.calls == 1
    assert not naps


# ------------------------------------------------------------------------------------------ real images


def real_data(name):
    root = Path(os.environ.get("UNDERPAINT_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / name
    if not root.is_dir():
        pytest.skip(f"'{name}' is not there: real images are not part of the project; set UNDERPAINT_TEST_DATA")
    return str(root)


@pytest.mark.slow
def test_real_parquet_files():
    guessed = guess_dataset(real_data("tiny-imagenet"))
    train, validation = open_dataset(guessed.train), open_dataset(guessed.validation)
    assert (len(train), len(validation)) == (80_000, 10_000)  # as the data's own notes say
    assert len(train.classes) == 200
    assert train.classes == validation.classes
    read = ImagePass(validation, transform=Crop(64, 64), batch=500)
    labels, grey = [], 0
    for batch in read:
        labels += batch.labels.tolist()
        assert batch.texts == tuple(validation.classes[label] for label in batch.labels)
        channels = batch.images.short()
        grey += int((channels[..., 0] == channels[..., 2]).all(dim=(1, 2)).sum()) if channels.numel() else 0
    assert read.broken == 0
    assert np.bincount(labels).tolist() == [50] * 200
    assert 0.01 < grey / len(labels) < 0.03  # about 1.7 % of the files are greyscale


def test_a_real_tar():
    dataset = open_dataset(guess_dataset(real_data("imagenet-samples")).train)
    assert len(dataset) == 500
    assert [dataset[i].label for i in range(0, 500, 50)] == list(range(0, 1000, 100))  # every second class
    assert dataset[0].image.shape == (256, 256, 3)
    assert dataset[0].text == "tench"  # class 0 of ImageNet
