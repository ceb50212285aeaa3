"""Sources: every kind on real small files, and what hostile or damaged ones are answered."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpldm_dist.config import DatasetConfig
from dpldm_dist.data.images import class_order, open_source
from dpldm_dist.data.letters import CLASSES, letters
from dpldm_dist.data.picture import content_digest, decode_image, square_image
from dpldm_dist.errors import ConfigError, DataError


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (6, 5), dtype=np.uint8)


def encoded(image: np.ndarray, form: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, form, **options)
    return out.getvalue()


def opened(source, **options):
    return open_source(DatasetConfig(source=str(source), **options))


def told(images) -> list[tuple]:
    return [(i.label, i.caption, i.unit) for i in images]


def write_tar(path: Path, members: dict[str, bytes], *, end: bool = True) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, payload in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
        size = tar.offset
    if not end:
        path.write_bytes(path.read_bytes()[:size])
    return path


# --- folders and CSV ------------------------------------------------------------------------------


def test_a_folder_has_one_class_per_sub_folder_and_the_classes_take_turns(tmp_path):
    for name, count in (("cat", 2), ("dog", 1)):
        (tmp_path / name / "deep").mkdir(parents=True)
        for i in range(count):
            (tmp_path / name / "deep" / f"{i}.png").write_bytes(encoded(pixels(i)))
        (tmp_path / name / "notes.txt").write_text("left out")
    images = opened(tmp_path)
    assert [image.label for image in images] == ["cat", "dog", "cat"]
    assert np.array_equal(images[2].read(), pixels(1))
    assert len(opened(tmp_path, limit=2)) == 2


def test_a_folder_without_classes_or_with_an_empty_one_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(pixels(0)))
    with pytest.raises(DataError, match="sub-folders"):
        opened(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        opened(tmp_path)


def test_a_csv_gives_labels_captions_and_units(tmp_path):
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "a.png").write_bytes(encoded(pixels(0)))
    (tmp_path / "b.jpg").write_bytes(encoded(pixels(1), "JPEG"))
    table = '\ufefffile,label,caption,unit\ni/a.png,1,"a, b",p1\nb.jpg,0,,p2\n'
    (tmp_path / "t.csv").write_text(table)
    images = opened(tmp_path / "t.csv")
    assert told(images) == [("1", "a, b", "p1"), ("0", "", "p2")]
    assert np.array_equal(images[0].read(), pixels(0)) and images[1].read().shape == (6, 5)


@pytest.mark.parametrize(
    ("table", "answer"),
    [
        ("file,class\na.png,1\n", "expected file,label"),
        ("", "expected file,label"),
        ("file,label,label\na.png,1,2\n", "each once"),
        ("file,label\na.png,\n", "row 2"),
        ("file,label,unit\na.png,1,u\nb.png,1,\n", "row 3"),
        ("file,label\na.png,1,2,3\n", "row 2"),
        ("file,label\n../secret.png,1\n", "below the folder"),
        ("file,label\n/etc/passwd,1\n", "below the folder"),
        ("file,label\nx/../../y.png,1\n", "below the folder"),
        ("file,label\n", "holds no image"),
        ('file,label\n"a.png,1\n', "not a readable CSV"),
    ],
)
def test_a_wrong_csv_is_answered_with_its_row(tmp_path, table, answer):
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(DataError, match=answer):
        opened(tmp_path / "t.csv")


def test_a_missing_image_of_a_csv_is_named_when_it_is_read(tmp_path):
    (tmp_path / "t.csv").write_text("file,label\nnone.png,1\nzero\x00.png,1\n")
    for image in opened(tmp_path / "t.csv"):
        with pytest.raises(DataError):
            image.read()


# --- tars ---------------------------------------------------------------------------


def test_tars_are_found_by_range_glob_and_folder_and_read_in_order(tmp_path):
    for n in range(3):
        facts = json.dumps({"label": 7, "caption": "c", "unit": f"u{n}"}).encode()
        members = {
            f"a{n}.png": encoded(pixels(n)),
            f"a{n}.json": facts,
            f"b{n}.jpg": encoded(pixels(n), "JPEG"),
            f"b{n}.cls": b"3\n",
            f"b{n}.json": json.dumps({"unit": "same"}).encode(),
            f"b{n}.seg.bin": b"left out",
        }
        write_tar(tmp_path / f"train-{n:03d}.tar", members)
    patterns = (tmp_path / "train-{000..002}.tar", tmp_path / "train-*.tar", tmp_path)
    for pattern in patterns:
        images = opened(pattern)
        assert told(images)[:3] == [("7", "c", "u0"), ("3", None, "same"), ("7", "c", "u1")]
        assert np.array_equal(images[2].read(), pixels(1))
    assert len(opened(tmp_path / "train-{001..002}.tar")) == 4


def test_a_missing_tar_of_a_range_and_an_empty_match_are_named(tmp_path):
    write_tar(tmp_path / "t-0.tar", {"a.png": encoded(pixels(0)), "a.cls": b"1"})
    with pytest.raises(DataError, match=r"t-1\.tar is missing"):
        opened(tmp_path / "t-{0..1}.tar")
    with pytest.raises(DataError, match="No file matches"):
        opened(tmp_path / "x-*.tar")


PNG = encoded(pixels(0))


@pytest.mark.parametrize(
    ("members", "answer"),
    [
        ({"../../x.png": PNG, "../../x.cls": b"1"}, "no plain file with a key"),
        ({"/etc/x.png": PNG, "/etc/x.cls": b"1"}, "no plain file with a key"),
        ({"a b.png": PNG, "a b.cls": b"1"}, "no plain file with a key"),
        ({".png": PNG, ".cls": b"1"}, "no plain file with a key"),
        ({"a.png": PNG}, "no label"),
        ({"a.png": PNG, "a.json": b'{"caption": "x"}'}, "no label"),
        ({"a.png": PNG, "a.json": b"[1]"}, "not a JSON object"),
        ({"a.png": PNG, "a.jpg": PNG, "a.cls": b"1"}, "two images"),
        ({"a.cls": b"1"}, "no image"),
        ({"a.png": PNG, "a.cls": b"\xff\xfe"}, "not a whole"),
    ],
)
def test_a_wrong_tar_is_answered_with_its_name(tmp_path, members, answer):
    with pytest.raises(DataError, match=answer) as error:
        opened(write_tar(tmp_path / "t.tar", members))
    assert "t.tar" in str(error.value)


@pytest.mark.parametrize("facts", [{"unit": ["p"]}, {"unit": True}, {"unit": 1.0}, {"caption": {}}])
def test_a_unit_or_caption_that_is_none_is_refused(tmp_path, facts):
    members = {"a.png": PNG, "a.json": json.dumps({"label": 1, **facts}).encode()}
    with pytest.raises(DataError, match=r"a\.json has a caption or unit that is none"):
        opened(write_tar(tmp_path / "t.tar", members))


def test_a_key_repeated_in_another_tar_is_refused(tmp_path):
    for n in range(2):
        write_tar(tmp_path / f"t{n}.tar", {"a.png": PNG, "a.cls": b"1"})
    with pytest.raises(DataError, match=r"t1\.tar repeats a key"):
        opened(tmp_path / "t{0..1}.tar")


def test_a_tar_that_is_cut_or_goes_on_after_its_end_is_refused(tmp_path):
    members = {
        f"{name}.{kind}": PNG if kind == "png" else b"1" for name in "ab" for kind in ("png", "cls")
    }
    cut = write_tar(tmp_path / "cut.tar", members, end=False)
    with pytest.raises(DataError, match="cut off"):
        opened(cut)  # at a boundary of members, where a tar still lists without a word
    whole = write_tar(tmp_path / "t.tar", members).read_bytes()
    (tmp_path / "within.tar").write_bytes(whole[:700])
    (tmp_path / "twice.tar").write_bytes(whole + whole)
    (tmp_path / "bad.tar").write_bytes(whole[:1024] + b"\x01" * 512 + whole[1536:])
    (tmp_path / "zeros.tar").write_bytes(bytes(10240))
    (tmp_path / "packed.tar").write_bytes(gzip.compress(whole))
    for name in ("within", "twice", "bad", "zeros", "packed"):
        with pytest.raises(DataError, match=rf"{name}\.tar"):
            opened(tmp_path / f"{name}.tar")


def test_links_and_devices_in_a_tar_are_refused(tmp_path):
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        with tarfile.open(tmp_path / "t.tar", "w") as tar:
            info = tarfile.TarInfo("a.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        with pytest.raises(DataError, match="no plain file"):
            opened(tmp_path / "t.tar")


@pytest.mark.parametrize("pattern", ["{000000..999999}{000000..999999}.tar", "{5..3}.tar"])
def test_a_pattern_that_counts_without_end_is_refused(pattern):
    with pytest.raises(DataError, match="expected"):
        opened(pattern)


def test_a_chain_of_headers_that_a_reader_would_follow_for_ever_is_refused(tmp_path):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1
    block = header.tobuf(tarfile.GNU_FORMAT) + b"a" + bytes(511)
    (tmp_path / "t.tar").write_bytes(block * 3000 + bytes(1024))
    with pytest.raises(DataError, match=r"t\.tar is not a whole"):
        opened(tmp_path / "t.tar")


def test_pickles_in_a_tar_are_never_loaded(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (marker,))

    evil = pickle.dumps(Evil())
    members = {"a.png": PNG, "a.cls": b"1"} | {
        f"a.{e}": evil for e in ("pyd", "pkl", "pickle", "pth")
    }
    assert len(opened(write_tar(tmp_path / "t.tar", members))) == 1
    for extension in ("cls", "json", "txt", "png"):
        with pytest.raises(DataError):
            opened(write_tar(tmp_path / "t.tar", {"b.png": PNG, f"b.{extension}": evil}))[0].read()
    assert not marker.exists()


@pytest.mark.parametrize(
    "source", ["pipe:touch {0}", "pipe:touch {0};.tar", "http://x/{0}.tar", "s3://b/x.tar"]
)
def test_sources_that_are_not_paths_are_refused_and_not_run(tmp_path, source):
    marker = tmp_path / "ran"
    with pytest.raises(DataError, match="expected a path on disk"):
        opened(source.format(marker))
    assert not marker.exists()


# --- arrays ---------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_arrays_are_found_by_name(tmp_path, end):
    images, labels = pixels(0, 4, 6, 5), np.array([3, 0, 1, 3], dtype=np.uint8)
    pack = gzip.compress if end else bytes
    (tmp_path / f"train-images-idx3-ubyte{end}").write_bytes(pack(idx(images)))
    (tmp_path / f"train-labels-idx1-ubyte{end}").write_bytes(pack(idx(labels)))
    for source in (tmp_path, tmp_path / f"train-images-idx3-ubyte{end}"):
        found = opened(source, limit=3)
        assert [image.label for image in found] == ["3", "0", "1"]
        assert np.array_equal(found[2].read(), images[2])
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(images))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(DataError, match="several IDX files"):
        opened(tmp_path)


def test_damaged_idx_arrays_are_named(tmp_path):
    images, labels = tmp_path / "x-images-idx3-ubyte", tmp_path / "x-labels-idx1-ubyte"
    good = idx(pixels(0, 4, 6, 5))
    labels.write_bytes(idx(np.zeros(4, dtype=np.uint8)))
    huge = struct.pack(">BBBB3I", 0, 0, 8, 3, *[2**32 - 1] * 3)
    for bad in (
        b"",
        good[:3],
        good[:9],
        good[:-1],
        good + b"x",
        b"\1" + good[1:],
        huge,
        idx(pixels(0, 3)),
    ):
        images.write_bytes(bad)
        with pytest.raises(DataError, match="x-images"):
            opened(images)
    images.write_bytes(idx(pixels(0, 5, 6, 5)))
    with pytest.raises(DataError, match="one label per image"):
        opened(images)
    labels.unlink()
    with pytest.raises(DataError, match="has no labels"):
        opened(images)
    packed = tmp_path / "y-images-idx3-ubyte.gz"
    (tmp_path / "y-labels-idx1-ubyte").write_bytes(idx(np.zeros(4, dtype=np.uint8)))
    packed.write_bytes(gzip.compress(good)[:-12])
    with pytest.raises(DataError, match="y-images"):
        opened(packed)


def test_npz_arrays_give_labels_captions_and_units(tmp_path):
    arrays = {
        "images": pixels(0, 3, 6, 5, 3),
        "labels": np.array(["b", "a", "b"]),
        "captions": np.array(["x", "y", "z"]),
        "units": np.array([1, 1, 2]),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    images = opened(tmp_path / "a.npz")
    assert told(images) == [("b", "x", "1"), ("a", "y", "1"), ("b", "z", "2")]
    assert np.array_equal(images[1].read(), arrays["images"][1])


@pytest.mark.parametrize(
    ("arrays", "answer"),
    [
        ({"images": pixels(0, 2, 6, 5)}, "expected the arrays images and labels"),
        ({"images": pixels(0, 2, 6, 5) / 255, "labels": np.zeros(2, int)}, "uint8"),
        ({"images": pixels(0, 2, 6, 5, 4), "labels": np.zeros(2, int)}, "C 1 or 3"),
        (
            {"images": pixels(0, 2, 6), "labels": np.zeros((2, 1), int)},
            "one integer or string each",
        ),
        ({"images": pixels(0, 2, 6, 5), "labels": np.zeros(2)}, "one integer or string each"),
    ],
)
def test_a_wrong_npz_is_answered(tmp_path, arrays, answer):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=answer):
        opened(tmp_path / "a.npz")


def test_a_pickled_or_damaged_npz_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (marker,))

    evil = np.array([Evil()], dtype=object)
    np.savez(tmp_path / "a.npz", images=evil, labels=np.zeros(1, int))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "c.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:80])
    (tmp_path / "d.npz").write_bytes(b"")
    np.save(tmp_path / "e", evil, allow_pickle=True)
    (tmp_path / "e.npy").rename(tmp_path / "e.npz")
    for name in "abcde":
        with pytest.raises(DataError, match=rf"{name}\.npz is not an NPZ"):
            opened(tmp_path / f"{name}.npz")
    assert not marker.exists()


def test_a_source_of_an_unknown_kind_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"x")
    with pytest.raises(DataError, match="unknown kind"):
        opened(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="does not exist"):
        opened(tmp_path / "nothing")


# --- one image ---------------------------------------------------------------------------


def test_images_are_read_as_eight_bits_upright_and_on_black():
    grey16 = (np.arange(12, dtype=np.uint16) * 5000).reshape(3, 4)
    assert np.array_equal(decode_image(encoded(grey16), "x"), grey16 >> 8)
    clear = np.full((2, 2, 4), 255, dtype=np.uint8)
    clear[0, 0, 3] = 0
    read = decode_image(encoded(clear), "x")
    assert read[0, 0].tolist() == [0, 0, 0] and read[1, 1].tolist() == [255, 255, 255]
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held sideways
    assert decode_image(encoded(pixels(0, 4, 8, 3), "JPEG", exif=turned), "x").shape == (8, 4, 3)


def test_an_image_that_cannot_be_read_is_named():
    jpeg, eps = encoded(pixels(0, 64, 64, 3), "JPEG"), encoded(pixels(0, 8, 8, 3), "EPS")
    for bad in (
        b"",
        b"GIF89a",
        PNG[:40],
        jpeg[: len(jpeg) // 2],
        eps,
        b"\x89PNG\r\n\x1a\n" + bytes(99),
    ):
        with pytest.raises(DataError, match=r"Image cat\.png cannot be read"):
            decode_image(bad, "cat.png")


def test_a_decompression_bomb_is_an_image_that_cannot_be_read(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(DataError, match="Decompression"):
        decode_image(encoded(pixels(0, 6, 5)), "x")


def test_a_small_image_is_padded_evenly_with_its_background_and_never_blurred():
    image = pixels(0, 28, 28)
    image[[0, -1]] = image[:, [0, -1]] = 7
    square = square_image(image, size=32, channels=1, crop="center")
    assert square.shape == (32, 32, 1) and square.dtype == np.uint8
    assert np.array_equal(square[2:30, 2:30, 0], image)
    square[2:30, 2:30] = 7
    assert (square == 7).all()


def test_a_large_image_loses_what_is_outside_of_its_centred_square():
    image = np.zeros((40, 100), dtype=np.uint8)
    image[:, 30:70] = 200
    assert (square_image(image, size=16, channels=1, crop="center") == 200).all()
    assert not (square_image(image, size=16, channels=1, crop="resize") == 200).all()
    narrow = square_image(pixels(0, 10, 100), size=16, channels=1, crop="center")
    assert np.array_equal(narrow[3:13, 3:13, 0], pixels(0, 10, 100)[:, 45:55])


def test_grey_and_colour_become_one_another():
    grey = pixels(0, 8, 8)
    colour = square_image(grey, size=8, channels=3, crop="center")
    assert np.array_equal(colour, np.repeat(grey[:, :, None], 3, axis=2))
    assert np.array_equal(square_image(colour, size=8, channels=1, crop="center")[:, :, 0], grey)


def test_the_content_digest_tells_shape_and_pixels():
    flat, tall = np.zeros((2, 8, 1), np.uint8), np.zeros((8, 2, 1), np.uint8)
    assert content_digest(flat) == content_digest(flat.copy()) != content_digest(tall)
    flat[1, 1] = 1
    assert content_digest(flat) != content_digest(np.zeros((2, 8, 1), np.uint8))


# --- built in, classes ---------------------------------------------------------------------------


def test_letters_are_the_same_every_time_and_a_shorter_set_is_a_prefix():
    many, labels = letters(150)
    few, _ = letters(110)
    assert many.shape == (150, 28, 28) and many.dtype == np.uint8
    assert np.array_equal(many[:110], few) and not np.array_equal(letters(10, seed=1)[0], many[:10])
    assert labels[:27].tolist() == [*range(26), 0]


def test_letters_look_like_handwriting_on_black():
    images, _ = letters(520)
    ink = (images > 127).mean(axis=(1, 2))
    assert ink.min() > 0.02 and ink.max() < 0.5  # strokes, neither empty nor a blot
    assert (images[:, [0, -1]] == 0).all() and (images[:, :, [0, -1]] == 0).all()
    rows = np.arange(28)
    weight = images.sum(axis=(1, 2), dtype=float)
    middle = (images.sum(axis=2) * rows).sum(axis=1) / weight
    assert abs(middle.mean() - 13.5) < 0.3
    assert len({image.tobytes() for image in images}) == 520


def test_only_letters_are_drawn(monkeypatch):
    from dpldm_dist.data import letters as module

    asked = set()
    original = module.HersheyFonts.strokes_for_text

    def noting(self, text):
        asked.add(text)
        return original(self, text)

    monkeypatch.setattr(module.HersheyFonts, "strokes_for_text", noting)
    letters(26)
    assert asked == set(CLASSES) | {letter.upper() for letter in CLASSES}


def test_the_held_out_digits_are_no_private_ones():
    private, held_out = opened("builtin:digits"), opened("builtin:digits-heldout")
    assert (len(private), len(held_out)) == (4000, 1000)
    for images, each in ((private, 400), (held_out, 100)):
        assert [sum(i.label == str(d) for i in images) for d in range(10)] == [each] * 10
    contents = [{content_digest(i.read()) for i in images} for images in (private, held_out)]
    assert len(contents[0]) == 4000 and len(contents[1]) == 1000
    assert not contents[0] & contents[1]
    assert private[0].read().shape == (28, 28) and private[0].read().max() > 200


def test_an_unknown_built_in_source_is_refused():
    with pytest.raises(ConfigError, match="expected builtin:letters"):
        opened("builtin:emnist")


def test_classes_are_sorted_by_number_where_all_are_numbers():
    assert class_order(["10", "9", "-1", "9"]) == ("-1", "9", "10")
    assert class_order(["10", "9", "b"]) == ("10", "9", "b")
    assert class_order(["²", "1"]) == ("1", "²")
