"""Make the built-in CLIP: a nano image tower and a nano text tower that can read printed characters and their names.

``python -m experiments.setup.pretrain_clip [--out FOLDER]`` takes about six minutes on two CPU cores, and writes the
folder ``nano_clip`` as transformers has it. It is no CLIP of the world: its images are the glyphs of ``pretrain`` (no
handwriting), its words those of ``TEMPLATES`` with the names of 42 characters, a digit as a word or as a sign. Each
step scores images against the names of all characters in one template, and its loss is the cross-entropy over them
(among texts of a batch, as CLIP has it, the same name would stand more than once).

``--data SOURCE --out FOLDER`` makes one of the training images of any data set and the names of its classes instead, as
small and in the same way, for ``--model clip --weights FOLDER``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments.setup import data
from experiments.setup.augment import augmentation
from experiments.setup.backbone import BUILT_IN
from experiments.setup.digits import SIDE, digits
from experiments.setup.pretrain import (
    BATCH,
    DIGITS,
    HELD_OUT,
    LETTERS,
    MEAN,
    PATCH,
    SCAN,
    STD,
    STEPS,
    batch,
    descended,
    fields,
    positions,
    write,
)
from models import clip_files, prompts, tables, tokenizer
from models.clip import PROMPT, Text, text_features
from models.vit import ViT, normalise, vit

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NAMES = [(*WORDS, *map("{} {}".format, ["capital" if x.isupper() else "small" for x in LETTERS], LETTERS))]
NAMES += [(*DIGITS, *NAMES[0][10:])]
TEMPLATES = (PROMPT, "{}", "a {}.", "a picture of the {}.", "an image of a printed {}.", "the sign {}.")
UNSEEN = "an image of the {}."  # of words that it knows
LENGTH, PROJECTION = 16, 32  # tokens of the longest text; width of the features
WIDTH, DEPTH, HEADS, MLP = 64, 2, 4, 128  # of the text tower
AT_ONCE = 256  # test images that are looked at together
SCALE = 14.0  # where exp(logit_scale) starts: CLIP, section 2.5; at most 100, as there


class Lesson(NamedTuple):
    """What a small CLIP learns to read.

    Attributes:
      names: ways of calling its classes, each with one name for every class.
      batch: ``(key) -> (images [n, side, side, 3] as the model sees them, labels [n])``.
      side: of the images.
      said: where it comes from, for the file's metadata.
    """

    names: Sequence[tuple[str, ...]]
    batch: Callable[[Array], tuple[Array, Array]]
    side: int
    said: dict[str, str]

    @property
    def texts(self) -> list[str]:
        """Of every template, and every way of calling them, one for each class."""
        return [template.format(name) for template in TEMPLATES for names in self.names for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.setup.pretrain_clip", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, help=f"folder to write (default: {BUILT_IN['clip']})")
    parser.add_argument("--data", help="what it learns to read, as for --data of compare (default: printed characters)")
    parser.add_argument("--image-size", type=int, default=32, help="side of its images (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"a multiple of {SCAN} (default: %(default)s)")
    options = parser.parse_args()
    try:
        if options.steps < SCAN or options.steps % SCAN:
            raise ValueError(f"--steps must be a multiple of {SCAN}; got {options.steps}")
        if options.data is not None and options.out is None:
            raise ValueError("--data makes a model of its own: name the folder to write with --out")
        lesson = characters(fields()[0]) if options.data is None else of_data(options.data, options.image_size)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    path, params = options.out or BUILT_IN["clip"], pretrain(lesson, options.steps)
    save(path, params, lesson)
    print(f"wrote {path} ({sum(file.stat().st_size for file in path.iterdir()) / 2**20:.2f} MB)")
    if options.data is None:
        report(params, lesson, fields()[1])
    else:
        report_data(params, lesson, data.resized(data.load(options.data, lesson.side), lesson.side))


def characters(glyphs: np.ndarray) -> Lesson:
    """Printed ones, of ``pretrain.fields``."""
    drawn = jnp.asarray(glyphs, jnp.float32)
    said = {"source": "glyphs (digits, letters) of the fonts bundled with matplotlib, and their names"}
    said |= {"licence": "Apache-2.0", "command": "python -m experiments.setup.pretrain_clip"}
    return Lesson(NAMES, lambda key: batch(key, drawn, BATCH), SIDE, said)


def of_data(source: str, side: int) -> Lesson:
    """The training images of a data set, mirrored and moved by up to an eighth, and its classes' names.

    Raises:
      ValueError: no such data, a side that is no multiple of the patches', or names that are alike or too long.
    """
    if side < PATCH or side % PATCH:
        raise ValueError(f"--image-size must be a multiple of {PATCH}, the side of a patch; got {side}")
    images = data.resized(data.load(source, side), side)
    names = tuple(name.replace("_", " ") for name in images.classes)
    x, y = jnp.asarray(images.x[~images.test]), jnp.asarray(images.y[~images.test])
    vary = augmentation(("flip", f"crop:{side // 8}"))

    def drawn(key: Array) -> tuple[Array, Array]:
        of_rows, of_views = jax.random.split(key)
        rows = jax.random.randint(of_rows, (BATCH,), 0, len(y))
        seen, labels = vary(of_views, (x[rows], y[rows]), len(names))
        return normalise(seen, MEAN, STD), labels

    said = {"source": f"the training images of {images.name} ({images.fingerprint()}), and its classes' names"}
    said |= {"licence": "that of these images", "command": f"python -m experiments.setup.pretrain_clip --data {source}"}
    lesson = Lesson((names,), drawn, side, said)
    told = tokenizer.built(*vocabulary(lesson))
    prompts.tokens([lesson.texts[i : i + len(names)] for i in range(0, len(lesson.texts), len(names))], told, LENGTH)
    return lesson


def vocabulary(lesson: Lesson) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens' numbers, and what joins bytes to the words of templates and names, the most frequent pair first.

    Pairs that are as frequent are in the order of their letters; the package's own trainer takes another.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    none = tokenizer.built({}, []).own
    cut = lambda text: none.pre_tokenizer.pre_tokenize_str(none.normalizer.normalize_str(text))
    words = Counter(word for text in lesson.texts for word, _ in cut(text))
    parts = {word: [*word[:-1], f"{word[-1]}{tokenizer.LAST}"] for word in words}
    merges: list[tuple[str, str]] = []
    while pairs := Counter({p: n for word, n in words.items() for p in pairwise(parts[word])}):
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        for own in parts.values():
            i = 0
            while i + 1 < len(own):
                if (own[i], own[i + 1]) == merges[-1]:
                    own[i : i + 2] = ["".join(merges[-1])]
                i += 1
    single = sorted(ByteLevel.alphabet())  # a character for each byte
    tokens = [*single, *(f"{x}{tokenizer.LAST}" for x in single), *map("".join, merges)]
    return {token: i for i, token in enumerate([*tokens, tokenizer.START, tokenizer.END])}, merges


def towers(tokens: int) -> tuple[ViT, Text]:
    kind = {"norm_pre": True, "act": "quick_gelu", "epsilon": 1e-5}
    image = vit(f"nano/{PATCH}", 1, **kind, projection=PROJECTION, unroll=True)
    return image, Text(tokens, LENGTH, WIDTH, DEPTH, HEADS, MLP, PROJECTION)


def pretrain(lesson: Lesson, steps: int = STEPS) -> dict[str, Any]:
    """``{"image", "text", "logit_scale"}``, parameters of both towers; ``steps`` a multiple of ``pretrain.SCAN``."""
    words = tokenizer.built(*vocabulary(lesson))
    image, text = towers(len(words.ids))
    of_image, of_text, data_key = jax.random.split(jax.random.key(0), 3)
    params: dict[str, Any] = dict(image.init(of_image, jnp.zeros((1, lesson.side, lesson.side, 3)))["params"])
    params["pos"] = params["pos"].at[1:].set(positions(*params["pos"][1:].shape))
    tokens, ends = (jnp.asarray(x) for x in words.encode_all(lesson.texts, LENGTH))
    ways, classes = len(lesson.names), jnp.arange(len(lesson.names[0]))
    told = {"tokens": tokens.reshape(len(TEMPLATES), ways, len(classes), -1)}
    told |= {"ends": ends.reshape(-1, ways, len(classes))}
    start = {
        "image": without_head(params),
        "text": text.init(of_text, tokens[:1], ends[:1])["params"],
        "logit_scale": jnp.log(jnp.full((), SCALE)),
    }

    def loss_fn(params, key):
        of_batch, of_template, of_names = jax.random.split(key, 3)
        x, y = lesson.batch(of_batch)
        template = jax.random.randint(of_template, (), 0, len(TEMPLATES))
        names = jax.random.randint(of_names, classes.shape, 0, ways)
        own = jax.tree.map(lambda x: x[template, names, classes], told)
        g: Any = text.apply({"params": params["text"]}, **own)
        logits = jnp.minimum(jnp.exp(params["logit_scale"]), 100.0) * features(image, params["image"], x) @ g.T
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return descended(start, loss_fn, data_key, steps)


def without_head(params: Any) -> dict[str, Any]:
    """An image tower's parameters that a CLIP has: patches are embedded without a bias."""
    return {**{name: x for name, x in params.items() if name != "head"}, "embed": {"kernel": params["embed"]["kernel"]}}


def features(image: ViT, params: dict[str, Any], x: Any) -> Any:
    """Of normalised images, ``[n, PROJECTION]``."""
    zero = {"kernel": jnp.zeros((PROJECTION, 1)), "bias": jnp.zeros(1)}
    embed = {**params["embed"], "bias": jnp.zeros(params["embed"]["kernel"].shape[-1])}
    return image.apply({"params": {**params, "embed": embed, "head": zero}}, x)[1]["features"]  # type: ignore[index]


def save(path: Path, params: dict[str, Any], lesson: Lesson) -> None:
    """Write the folder: arrays in half precision, the configuration, and the vocabulary."""
    from safetensors.numpy import save as packed

    ids, merges = vocabulary(lesson)
    image, _ = towers(len(ids))
    own = {**params["image"], "cls": params["image"]["cls"][0], "logit_scale": params["logit_scale"]}
    arrays = tables.write_params(clip_files.HUGGING_FACE.image, own, PATCH)
    arrays |= tables.write_params(clip_files.HUGGING_FACE.text, params["text"], 1)
    arrays = {name: np.array(x, np.float16, order="C") for name, x in arrays.items()}
    about = {**lesson.said, "format": "pt"}
    both = {"layer_norm_eps": image.epsilon, "hidden_act": image.act}
    seen = {"hidden_size": image.width, "num_hidden_layers": image.depth, "num_attention_heads": image.heads}
    seen |= {"intermediate_size": image.mlp_width, "image_size": lesson.side, "patch_size": PATCH, **both}
    told = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": MLP}
    told |= {"vocab_size": len(ids), "max_position_embeddings": LENGTH, **both}
    told |= {"bos_token_id": ids[tokenizer.START], "eos_token_id": ids[tokenizer.END]}
    config = {"model_type": "clip", "projection_dim": PROJECTION, "vision_config": seen, "text_config": told}
    files = {
        "model.safetensors": packed(arrays, about),
        "config.json": _json(config),
        "preprocessor_config.json": _json({"image_mean": MEAN.tolist(), "image_std": STD.tolist()}),
        tokenizer.VOCABULARY: _json(ids),
        tokenizer.MERGES: "".join(f"{line}\n" for line in ("#version: 0.2", *map(" ".join, merges))).encode(),
    }
    for name, content in files.items():
        write(path / name, lambda file, content=content: file.write(content))


def _json(content: Any) -> bytes:
    return f"{json.dumps(content, indent=1, ensure_ascii=False)}\n".encode()


def report_data(params: dict[str, Any], lesson: Lesson, images: data.Images) -> None:
    """Print accuracy on the test images of a data set, in a template that it has read and one that it has not."""
    words = tokenizer.built(*vocabulary(lesson))
    image, text = towers(len(words.ids))
    seen = jax.jit(lambda x: features(image, params["image"], normalise(x, MEAN, STD)))
    parts = np.array_split(np.flatnonzero(images.test), max(1, images.test.sum() // AT_ONCE))
    f = np.concatenate([np.asarray(seen(images.x[rows])) for rows in parts])
    for template in (PROMPT, UNSEEN):
        g = text_features(text, params["text"], words, [template.format(name) for name in lesson.names[0]])
        right = np.mean((f @ g.T).argmax(-1) == images.y[images.test])
        print(
            f"{template.format(lesson.names[0][0])!r} and so on: {100 * right:.1f} % of {images.test.sum()} test images"
        )


def report(params: dict[str, Any], lesson: Lesson, held_out: np.ndarray) -> None:
    """Print accuracy among the digits, with each way of calling them, on fonts and handwriting it has never seen."""
    words = tokenizer.built(*vocabulary(lesson))
    image, text = towers(len(words.ids))
    seen = jax.jit(lambda x: features(image, params["image"], x))
    printed = jax.jit(lambda key: batch(key, jnp.asarray(held_out, jnp.float32), 2000))(jax.random.key(1))
    hand = digits()
    training = hand["split"] == 0
    of_hand = seen(normalise(hand["x"][training], MEAN, STD)), hand["y"][training]
    for template in (PROMPT, UNSEEN):
        for names in NAMES:
            g = text_features(text, params["text"], words, [template.format(name) for name in names[:10]])
            share = lambda f, y, g=g: 100 * np.mean(np.argmax(f @ g.T, -1) == np.asarray(y))
            print(
                f"{template.format(names[3])!r} and so on: {share(seen(printed[0]), printed[1]):.1f} % of digits in "
                f"{', '.join(HELD_OUT)}, {share(*of_hand):.1f} % of the digits' training split"
            )


if __name__ == "__main__":
    main()
