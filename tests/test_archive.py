"""Arrays of .npz files: what np.load reads, and nothing is believed that the file cannot hold."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from models import archive
from models.archive import members, read_npz

ARRAYS = {
    "x": np.arange(480, dtype=np.uint8).reshape(10, 4, 4, 3),
    "turned": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big_endian": np.arange(5, dtype=">f4"),
    "names": np.array(["a", "bc"]),
    "scalar": np.array("text"),
    "empty": np.zeros((0, 3)),
    "half": np.ones(3, np.float16),
}


def npy(array, shape=None) -> bytes:
    """A .npy file, whose header may claim another shape."""
    buffer = io.BytesIO()
    if shape is None:
        np.lib.format.write_array(buffer, np.asarray(array))
        return buffer.getvalue()
    header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + array.tobytes()


def packed(path, content: dict[str, bytes], **options):
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, data in content.items():
            file.writestr(f"{name}.npy", data)


def changed(path, offset_in_directory: int, value: bytes):
    """Overwrite a field of the first entry of the central directory, and of its local header where both have it."""
    raw = bytearray(path.read_bytes())
    start = raw.index(b"PK\x01\x02") + offset_in_directory
    raw[start : start + len(value)] = value
    if 8 <= offset_in_directory < 28:  # the local header has these two bytes earlier
        raw[offset_in_directory - 2 : offset_in_directory - 2 + len(value)] = value
    path.write_bytes(raw)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_reads_what_numpy_reads(tmp_path, write):
    path = tmp_path / "a.npz"
    write(path, **ARRAYS)
    assert members(path) == list(ARRAYS)
    with np.load(path) as whole:
        for name, array in read_npz(path).items():
            assert array.dtype == whole[name].dtype
            np.testing.assert_array_equal(array, whole[name], strict=True)
    some = read_npz(path, {"x", "names", "absent"})
    assert set(some) == {"x", "names"}


HUGE = np.zeros(1000, np.float32)


def claim_elements(path):
    packed(path, {"x": npy(HUGE, (10**12,))})


def claim_elements_everywhere(path):
    """The directory agrees with the header: four bytes of size, 4 GB."""
    packed(path, {"x": npy(HUGE, (2**30 - 50,))}, compression=zipfile.ZIP_DEFLATED)
    changed(path, 24, (4 * (2**30 - 50) + 128).to_bytes(4, "little"))


def encrypt(path):
    packed(path, {"x": npy(HUGE)})
    changed(path, 8, b"\x01\x00")


def unknown_method(path):
    packed(path, {"x": npy(HUGE)})
    changed(path, 10, b"\x63\x00")


def flip(path):
    packed(path, {"x": npy(HUGE)}, compression=zipfile.ZIP_DEFLATED)
    raw = bytearray(path.read_bytes())
    raw[60] ^= 255
    path.write_bytes(raw)


def flip_stored(path):
    packed(path, {"x": npy(HUGE)})
    raw = bytearray(path.read_bytes())
    raw[1000] ^= 255
    path.write_bytes(raw)


def twice(path):
    packed(path, {"x": npy(HUGE)})
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("x.npy", npy(HUGE + 1))


def cut(path):
    packed(path, {"x": npy(HUGE)})
    path.write_bytes(path.read_bytes()[:2000])


BAD = {
    "10^12 elements": (claim_elements, "claims float32"),
    "10^9 elements, and the directory says so too": (claim_elements_everywhere, "more than"),
    "no elements of 10^30": (lambda p: packed(p, {"x": npy(HUGE[:0], (0, 10**30))}), "damaged"),
    "a negative number": (lambda p: packed(p, {"x": npy(HUGE, (-1000,))}), r"\[-1000\]"),
    "10^12 strings of no length": (lambda p: packed(p, {"x": npy(np.zeros(0, "S0"), (10**12,))}), "S"),
    "too short": (lambda p: packed(p, {"x": npy(HUGE)[:-4]}), "it has 3996"),
    "too long": (lambda p: packed(p, {"x": npy(HUGE) + b"1234"}), "it has 4004"),
    "pickled": (lambda p: np.savez(p, x=np.array([None, {}], object)), "pickled"),
    "encrypted": (encrypt, "encrypted"),
    "lzma": (lambda p: packed(p, {"x": npy(HUGE)}, compression=zipfile.ZIP_LZMA), "method 14"),
    "unknown packing": (unknown_method, "method 99"),
    "damaged deflate": (flip, "damaged"),
    "damaged bytes": (flip_stored, "CRC"),
    "twice": (twice, "'x' twice"),
    "no array": (lambda p: packed(p, {"x": b"hello"}), "damaged"),
    "cut": (cut, "truncated"),
    "no archive": (lambda p: p.write_bytes(npy(HUGE)), "no .npz"),
    "absent": (lambda p: None, "no file"),
    "folder": (lambda p: p.mkdir(), "no file"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_cannot_be_true_is_refused_before_memory_is_taken(tmp_path, case):
    write, said = BAD[case]
    path = tmp_path / "bad.npz"
    write(path)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=said) as refused:
            read_npz(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("case", ["10^12 elements", "encrypted", "lzma", "damaged deflate", "twice", "pickled"])
def test_what_nobody_asks_for_is_not_looked_at(tmp_path, case):
    path = tmp_path / "mixed.npz"
    BAD[case][0](path)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("y.npy", npy(np.arange(3)))
    np.testing.assert_array_equal(read_npz(path, ["y"])["y"], np.arange(3))
    assert set(members(path)) == {"x", "y"}


def test_arrays_that_are_not_packed_are_found_in_the_file(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    np.savez(tmp_path / "a.npz", first=np.arange(9), x=x, by_columns=np.asfortranarray(x), one=x[:, 0, 0])
    for name, expected in (("x", x), ("one", x[:, 0, 0]), ("first", np.arange(9))):
        place = archive.stored(tmp_path / "a.npz", name)
        assert place is not None
        found = np.fromfile(tmp_path / "a.npz", place.dtype, expected.size, offset=place.start).reshape(place.shape)
        np.testing.assert_array_equal(found, expected)
    assert archive.stored(tmp_path / "a.npz", "by_columns") is None
    assert archive.stored(tmp_path / "a.npz", "y") is None
    np.savez_compressed(tmp_path / "b.npz", x=x)
    assert archive.stored(tmp_path / "b.npz", "x") is None
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content.replace(b"(5, 4, 3)", b"(9, 4, 3)"))
    with pytest.raises(ValueError, match=r"damaged, truncated or no .npz file"):
        archive.stored(tmp_path / "a.npz", "x")


def test_arrays_beyond_the_memory_of_the_machine_are_refused_unread(tmp_path, monkeypatch):
    """Zeros pack a thousand to one: a small file may well hold what no memory does."""
    np.savez_compressed(tmp_path / "zeros.npz", x=np.zeros(2**20), y=np.zeros(3))
    monkeypatch.setattr(archive, "_memory", lambda: 2**22)
    monkeypatch.setattr(archive.npy, "read_array", None)
    with pytest.raises(ValueError, match=r"this machine has 0\.0"):
        read_npz(tmp_path / "zeros.npz")
