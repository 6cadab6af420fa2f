"""A split over clients in a file: whose each training image is. Natural ones too, by writer or hospital.

``.npz`` with ``client`` integer ``[training images]``, in the order of the data (its test images left out): from 0, the
unseen clients last, -1 of nobody; and ``images``, a fingerprint of the training images' classes and domains, where it
was saved here: the images may well be of another size. With ``--validation`` a client's images that are set apart are
left out.
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


def content(parts: list[np.ndarray], count: int, fingerprint: str) -> bytes:
    """What a file says of ``count`` training images in these parts."""
    client, buffer = np.full(count, -1, np.int32), io.BytesIO()
    for i, part in enumerate(parts):
        client[part] = i
    np.savez_compressed(buffer, client=client, images=np.array(fingerprint))
    return buffer.getvalue()


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
