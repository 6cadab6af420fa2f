"""A split over clients in a file: whose each training image is. Natural ones too, by writer or hospital.

``.npz`` with ``client`` integer ``[training images]``, in the order of the data (its test images left out): from 0, the
unseen clients last, -1 of nobody. Where it was saved here also ``test_client``, the same of the test images (which else
are dealt out by class and domain), and ``images``, a fingerprint of the training images' classes and domains: the
images may well be of another size. With ``--validation`` a client's images that are set apart are left out.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np

from experiments.setup.data import Images
from models import archive

PREFIX = "file:"


def fingerprint(images: Images, rows: np.ndarray) -> str:
    """Of which class and domain the images in ``rows`` are, in order."""
    held = (images.y[rows], images.domain[rows])
    return hashlib.sha256(b"".join(np.ascontiguousarray(own).tobytes() for own in held)).hexdigest()[:16]


def content(parts: list[np.ndarray], count: int, tests: list[np.ndarray], tested: int, fingerprint: str) -> bytes:
    """What a file says of ``count`` training images in these parts, and of ``tested`` test images."""
    buffer, owners = io.BytesIO(), [np.full(n, -1, np.int32) for n in (count, tested)]
    for client, own in zip(owners, (parts, tests), strict=True):
        for i, rows in enumerate(own):
            client[rows] = i
    np.savez_compressed(buffer, client=owners[0], test_client=owners[1], images=np.array(fingerprint))
    return buffer.getvalue()


def tests_of(path: str | Path, count: int, clients: int) -> list[np.ndarray]:
    """Rows of every client's test images, of ``count``; ``[]`` where the file does not say.

    Raises:
      ValueError: the file cannot be read, or is of other test images or clients.
    """
    client = archive.read_npz(str(path), ("test_client",)).get("test_client")
    if client is None:
        return []
    if client.shape != (count,) or client.dtype.kind not in "iu" or (count and client.max() >= clients):
        raise ValueError(
            f"--partition file:{path}: test_client is {client.dtype} {list(client.shape)}, expected integers "
            f"[{count}], one for each test image, below {clients}"
        )
    return [np.flatnonzero(client == i) for i in range(clients)]


def read(path: str | Path, count: int, clients: int, minimum: int, fingerprint: str) -> list[np.ndarray]:
    """Rows of every client's training images.

    Raises:
      ValueError: the file cannot be read, is of other data, or does not give every client its share.
    """
    arrays = archive.read_npz(str(path), ("client", "images"))
    client = arrays.get("client")
    if client is None or client.shape != (count,) or client.dtype.kind not in "iu":
        got = "no array client" if client is None else f"client is {client.dtype} {list(client.shape)}"
        raise ValueError(f"--partition file:{path}: {got}, expected integers [{count}], one for each training image")
    if "images" in arrays and str(arrays["images"]) != fingerprint:
        raise ValueError(f"--partition file:{path} was saved for other images: save it anew for these")
    if client.min() < -1 or client.max() != clients - 1:
        raise ValueError(
            f"--partition file:{path} names clients from {client.min()} to {client.max()}: expected 0 to {clients - 1} "
            "(--clients and --holdout-clients together), and -1 for images of nobody"
        )
    parts = [np.flatnonzero(client == i) for i in range(clients)]
    least = min(range(clients), key=lambda i: len(parts[i]))
    if len(parts[least]) < minimum:
        raise ValueError(
            f"--partition file:{path} gives client {least} {len(parts[least])} training images; --minimum is {minimum}"
        )
    return parts
