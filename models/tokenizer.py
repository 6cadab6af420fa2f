"""Text to the tokens of CLIP, by the package ``tokenizers`` (the extra ``weights``), imported when one is read.

Sennrich et al., *Neural Machine Translation of Rare Words with Subword Units*, ACL 2016, arXiv 1508.07909, on bytes as
in Radford et al., *Language Models are Unsupervised Multitask Learners*, 2019. ``tokenizer.json`` says how texts are
cut. Of ``vocab.json`` and ``merges.txt`` the same is made as transformers' ``CLIPTokenizer`` makes of them (it leaves
out ``ftfy`` too, which mends text that was decoded wrongly).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import tokenizers

START, END = "<|startoftext|>", "<|endoftext|>"
LAST = "</w>"  # behind the last byte of a word
VOCABULARY, MERGES, WHOLE = "vocab.json", "merges.txt", "tokenizer.json"
# contractions, runs of letters, single digits, runs of anything else but spaces: CLIPTokenizer's
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer(NamedTuple):
    """A vocabulary, and how texts are cut into it.

    Attributes:
      ids: number of each token.
      own: the package's.
    """

    ids: Mapping[str, int]
    own: tokenizers.Tokenizer

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, between that of the start and that of the end."""
        # one by one: encode_batch starts threads, after which versions of the package warn of every fork
        return [self.ids[START], *self.own.encode(text, add_special_tokens=False).ids, self.ids[END]]

    def encode_all(self, texts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens ``[texts, tokens]`` of the longest text, at most ``length``, and where each has its end ``[texts]``.

        What is longer is cut before its end, what is shorter filled up with the end.
        """
        rows, end = [self.encode(text) for text in texts], self.ids[END]
        rows = [row if len(row) <= length else [*row[: length - 1], end] for row in rows]
        longest = max(map(len, rows))
        tokens = np.array([[*row, *[end] * (longest - len(row))] for row in rows], np.int32)
        return tokens, np.array([row.index(end) for row in rows], np.int32)


def files_in(folder: Path) -> dict[str, bytes]:
    """The files of the tokenizer in a folder, by name; those that ``find`` reads."""
    names = (WHOLE,) if (folder / WHOLE).is_file() else (VOCABULARY, MERGES)
    found = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    return found if len(found) == len(names) else {}


def find(folder: Path) -> Tokenizer | None:
    """The tokenizer in a folder, ``tokenizer.json`` or ``vocab.json`` and ``merges.txt``; ``None``: there is none.

    Raises:
      ValueError: it is damaged, or of another kind, or the package is not installed.
    """
    there = files_in(folder)
    if not there:
        return None
    path = folder / next(iter(there))
    try:
        import tokenizers
    except ImportError:
        raise ValueError(f"reading {path} needs the package tokenizers: pip install tokenizers") from None
    try:
        if path.name == WHOLE:
            own = tokenizers.Tokenizer.from_file(str(path))
        else:
            own = built(*tokenizers.models.BPE.read_file(str(path), str(folder / MERGES))).own
    except BaseException as error:  # the package raises Exception itself, and where it panics what is not even one
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        files, why = " with ".join(str(folder / name) for name in there), " ".join(str(error).split())
        raise ValueError(f"{files} cannot be read: {why}; fetch it anew") from None
    model = own.model
    if not isinstance(model, tokenizers.models.BPE) or model.end_of_word_suffix != LAST or own.pre_tokenizer is None:
        raise ValueError(
            f"{path} is no tokenizer of CLIP: expected a model BPE whose words end in {LAST}, and how texts are cut "
            "into words; take the one that was published with the weights"
        )
    ids = own.get_vocab()
    if lacks := [token for token in (START, END, model.unk_token or END) if token not in ids]:
        raise ValueError(
            f"{path} is no vocabulary of CLIP: {lacks[0]} is not among its {len(ids)} tokens, expected {START} and "
            f"{END}; take the one that was published with the weights"
        )
    own.no_truncation()  # a length and a filling that stand in a file are those of its last use
    own.no_padding()
    return Tokenizer(ids, own)


def built(ids: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """CLIP's of a vocabulary: the number of each token, and pairs that become one, the earliest first."""
    from tokenizers import Regex, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Own
    from tokenizers.models import BPE

    own = Own(BPE(dict(ids), list(merges), continuing_subword_prefix="", end_of_word_suffix=LAST, unk_token=END))
    own.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORD), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    own.add_special_tokens([token for token in (START, END) if token in ids])  # found before letters become small
    return Tokenizer(ids, own)
