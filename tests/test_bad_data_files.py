"""Data files that break the contract are refused in one line; what the contract does not name is not looked at."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from input_helpers import SMALL, change, cut_in_half, good_arrays, refused

from experiments.setup import data


def pickled(path: Path) -> None:
    np.savez(path, **(good_arrays() | {"classes": np.array(["a", None, {}], dtype=object)}))


def claim(path: Path) -> None:
    """A header that asks for 10^12 images."""
    change(x=None)(path)
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**12, 16, 16, 3)}
    with zipfile.ZipFile(path, "a") as file, file.open("x.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, header)  # type: ignore[arg-type]
        member.write(bytes(1000))


def squeezed(method: int) -> Callable[[Path], None]:
    """Packed as NumPy never packs."""

    def write(path: Path) -> None:
        change()(path)
        with zipfile.ZipFile(path) as file:
            members = {name: file.read(name) for name in file.namelist()}
        with zipfile.ZipFile(path, "w", method) as file:
            for name, content in members.items():
                file.writestr(name, content)

    return write


def encrypted(path: Path) -> None:
    change()(path)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)


x = good_arrays()["x"]
float_x = x.astype(np.float32)
float_x[5, 3, 3, 0] = np.nan

DATA_FILES = {
    "truncated data": (cut_in_half, "damaged"),
    "pickled data": (pickled, "pickled"),
    "NaN images": (change(x=float_x), "NaN"),
    "images as floats": (change(x=x / 255), "expected uint8"),
    "grey images": (change(x=x[..., :1]), "expected uint8"),
    "no images": (change(x=x[:0], y=np.arange(0), domain=np.arange(0), split=np.arange(0)), "N > 0"),
    "oblong images": (change(x=x[:, :12]), "--image-size"),
    "no labels": (change(y=None), "lacks the array(s) y"),
    "labels out of range": (change(y=np.arange(96) % 4), "y runs from 0 to 3; expected 0 to 2"),
    "negative labels": (change(y=np.arange(96) % 3 - 1), "y runs from -1"),
    "labels as floats": (change(y=np.ones(96)), "expected integers"),
    "too few labels": (change(y=np.zeros(95, int)), "expected integers [96]"),
    "empty domain": (change(domain=np.zeros(96, int)), "'right' has no training images"),
    "domain without test images": (change(split=np.zeros(96, int)), "no test images"),
    "domain without names": (change(domains=None), "only one of the arrays"),
    "labels as time": (change(y=np.zeros(96, "timedelta64[s]")), "y is timedelta64[s] [96]; expected integers"),
    "labels as truth": (change(y=np.zeros(96, bool)), "y is bool [96]; expected integers"),
    "labels beyond int64": (change(y=np.full(96, 2**63, np.uint64)), "y runs from 9223372036854775808"),
    "domains as time": (change(domain=np.zeros(96, "timedelta64[s]")), "domain is timedelta64[s]"),
    "classes of no dimension": (change(classes=np.array("abc")), "classes is <U3 []; expected names"),
    "domains of no dimension": (change(domains=np.array("ab")), "domains is <U2 []; expected names"),
    "classes of two dimensions": (change(classes=np.array([["a", "b", "c"]])), "classes is <U1 [1, 3]"),
    "classes as numbers": (change(classes=np.ones(3)), "classes is float64 [3]; expected names"),
    "one class": (change(y=np.zeros(96, int), classes=np.array(["a"])), "1 classes for 96 images"),
    "more classes than images": (change(classes=np.arange(10**6)), "1000000 classes for 96 images"),
    "a name that is no text": (change(classes=np.array(["a", "b\ud800", "c"])), "names that are no text"),
    "bytes that are no text": (change(classes=np.array([b"a", b"\xff", b"c"])), "names that are no text"),
    "a class without a name": (change(classes=np.array(["a", " ", "c"])), "an empty name"),
    "two domains of one name": (change(domains=np.array(["left", "left"])), "the same name"),
    "superclasses out of range": (change(superclass=np.array([0, 1, 10**9])), "superclass runs from 0 to 1000000000"),
    "superclasses for others": (change(superclass=np.zeros(4, int)), "expected integers [3]"),
    "a header that claims too much": (claim, "claims"),
    "encrypted data": (encrypted, "encrypted"),
    "data packed by lzma": (squeezed(zipfile.ZIP_LZMA), "packed by method 14"),
    "a folder": (lambda path: path.mkdir(), "holds no images"),
    "an empty file": (lambda path: path.touch(), "damaged"),
    "split of three": (change(split=np.arange(96) % 3), "split runs from 0 to 2"),
}


@pytest.mark.parametrize("case", DATA_FILES)
def test_data_files(case, tmp_path, capsys, monkeypatch, compilations):
    write, reason = DATA_FILES[case]
    write(tmp_path / "data.npz")
    arguments = ["run", "--method", "fedit", *SMALL, "--data", str(tmp_path / "data.npz")]
    message = refused([*arguments, "--out", str(tmp_path / "out")], capsys, monkeypatch)
    assert reason in message
    assert not (tmp_path / "out").exists()
    assert not compilations


def test_a_domain_partition_needs_domains(tmp_path, capsys, monkeypatch):
    change(domain=None, domains=None)(tmp_path / "data.npz")
    arguments = ["run", "--method", "fedit", *SMALL, "--data", str(tmp_path / "data.npz"), "--partition", "domain"]
    assert "needs data with domains" in refused([*arguments, "--out", str(tmp_path / "out")], capsys, monkeypatch)


def test_only_the_arrays_of_the_contract_are_opened(tmp_path):
    change(superclass=np.array([0, 0, 1]))(tmp_path / "data.npz")
    plain = data.load(str(tmp_path / "data.npz"))
    with zipfile.ZipFile(tmp_path / "data.npz", "a", zipfile.ZIP_LZMA) as file:
        file.writestr("other.npy", b"no array")
        file.writestr("note.txt", "nor this")
    assert data.load(str(tmp_path / "data.npz")).fingerprint() == plain.fingerprint()


def test_names_may_be_bytes_or_whole_numbers_and_classes_called_alike(tmp_path):
    change(classes=np.array([b"crane", b"crane", b"heron"]), domains=np.arange(2))(tmp_path / "data.npz")
    images = data.load(str(tmp_path / "data.npz"))
    assert (images.classes, images.domains) == (("crane", "crane", "heron"), ("0", "1"))


def test_a_validation_share_that_sets_nothing_apart_is_refused(tmp_path):
    change()(tmp_path / "data.npz")
    images = data.load(str(tmp_path / "data.npz"))
    assert data.validation(images, 0.1).test.any()
    with pytest.raises(ValueError, match=r"a share of 1e-09 .* another --validation"):
        data.validation(images, 1e-9)


@pytest.mark.parametrize("source", [(7, 20), (20, 20), (1500, 6)])
def test_images_are_resized_as_a_whole_would_be(source):
    """In parts and to bytes at once; 1,500 images are cut into two parts."""
    count, side = source
    x = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    images = data.Images("made up", x, *[np.zeros(count, np.int32)] * 2, np.zeros(count, bool), ("a", "b"), ("all",))
    whole = np.asarray(jax.image.resize(x.astype(np.float32), (count, 8, 8, 3), "bicubic"))
    got = data.resized(images, 8).x
    assert got.dtype == np.uint8
    assert np.abs(got - np.clip(np.round(whole), 0, 255)).max() <= 1  # a half may be rounded either way
    assert np.mean(got != np.clip(np.round(whole), 0, 255)) < 1e-3
