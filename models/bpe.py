"""Text to the tokens of CLIP: byte-pair encoding of words in lower case.

Sennrich et al., *Neural Machine Translation of Rare Words with Subword Units*, ACL 2016, arXiv 1508.07909, on bytes as
in Radford et al., *Language Models are Unsupervised Multitask Learners*, 2019. What a text is cut into is what
transformers' ``CLIPTokenizer`` cuts it into (without ``ftfy``, which mends text that was decoded wrongly).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

START, END = "<|startoftext|>", "<|endoftext|>"
WHOLE = (START, END, "'s", "'t", "'re", "'ve", "'m", "'ll", "'d")  # words of their own wherever they stand
LAST = "</w>"  # behind the last byte of a word
VOCABULARY, MERGES, BOTH = "vocab.json", "merges.txt", "tokenizer.json"
# a printable character for each byte, as GPT-2 has them: its own where it has one that can be seen
_SEEN = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTES = {byte: chr(byte) for byte in _SEEN}
BYTES |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)).difference(_SEEN)))}


class Bpe(NamedTuple):
    """A vocabulary.

    Attributes:
      ids: number of each token.
      ranks: of each pair of tokens that become one, how early they do.
    """

    ids: Mapping[str, int]
    ranks: Mapping[tuple[str, str], int]

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, between that of the start and that of the end; what is not known is one of the end."""
        end = self.ids[END]
        words = (word for word in split(text))
        parts = ([word] if word in (START, END) else self._merged(word) for word in words)
        return [self.ids[START], *(self.ids.get(token, end) for own in parts for token in own), end]

    def encode_all(self, texts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens ``[texts, tokens]`` of the longest text, at most ``length``, and where each has its end ``[texts]``.

        What is longer is cut before its end, what is shorter filled up with the end.
        """
        rows, end = [self.encode(text) for text in texts], self.ids[END]
        rows = [row if len(row) <= length else [*row[: length - 1], end] for row in rows]
        longest = max(map(len, rows))
        tokens = np.array([[*row, *[end] * (longest - len(row))] for row in rows], np.int32)
        return tokens, np.array([row.index(end) for row in rows], np.int32)

    def _merged(self, word: str) -> list[str]:
        parts = [BYTES[byte] for byte in word.encode()]
        parts[-1] += LAST
        while True:
            pairs = list(pairwise(parts))
            i = min(range(len(pairs)), key=lambda i: self.ranks.get(pairs[i], len(self.ranks)), default=None)
            if i is None or pairs[i] not in self.ranks:
                return parts
            parts[i : i + 2] = ["".join(pairs[i])]


def split(text: str) -> Iterator[str]:
    """Words of a text: contractions, runs of letters, single digits, runs of anything else but spaces."""
    text = "".join(x.lower() for x in unicodedata.normalize("NFC", text))
    i = 0
    while i < len(text):
        kind = _kind(text[i])
        whole = next((word for word in WHOLE if text.startswith(word, i)), None)
        stop = i + len(whole or " ")
        while whole is None and kind in ("letter", "other") and stop < len(text) and _kind(text[stop]) == kind:
            stop += 1
        if kind != "space":
            yield text[i:stop]
        i = stop


def _kind(x: str) -> str:
    if x.isspace() and not "\x1c" <= x <= "\x1f":  # which are no White_Space to Unicode
        return "space"
    return {"L": "letter", "N": "digit"}.get(unicodedata.category(x)[0], "other")


def files_in(folder: Path) -> dict[str, bytes]:
    """The files of the vocabulary in a folder, by name; those that ``find`` reads."""
    pair = (VOCABULARY, MERGES)
    names = pair if all((folder / name).is_file() for name in pair) else (BOTH,)
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def find(folder: Path) -> Bpe | None:
    """The vocabulary in a folder, ``vocab.json`` and ``merges.txt`` or ``tokenizer.json``; ``None``: there is none.

    Raises:
      ValueError: it is damaged, or another kind of tokenizer.
    """
    if (folder / VOCABULARY).is_file() and (folder / MERGES).is_file():
        path, ids = folder / VOCABULARY, _json(folder / VOCABULARY)
        lines = (folder / MERGES).read_text(encoding="utf-8").split("\n")
        merges: Any = [line for line in lines if line.strip() and not line.startswith("#version")]
    elif (folder / BOTH).is_file():
        path = folder / BOTH
        model = _json(path).get("model")
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or model.get("end_of_word_suffix") != LAST:
            raise ValueError(f"{path} is no tokenizer of CLIP: expected a model BPE whose words end in {LAST}")
        ids, merges = model.get("vocab"), model.get("merges")
    else:
        return None
    pairs = [tuple(re.split(" ", x)) if isinstance(x, str) else tuple(x) for x in merges or ()]
    if (
        not isinstance(ids, dict)
        or not all(isinstance(i, int) for i in ids.values())
        or not {START, END} <= ids.keys()
        or not all(len(pair) == 2 for pair in pairs)
    ):
        raise ValueError(f"{path} is no vocabulary of CLIP: expected numbers of tokens, {START} and {END} among them")
    return Bpe(ids, {pair: i for i, pair in enumerate(pairs)})  # type: ignore[misc]


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}; fetch it anew") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no vocabulary: expected an object")
    return content
