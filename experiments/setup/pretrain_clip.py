"""Make the built-in CLIP: a nano image tower and a nano text tower that can read printed characters and their names.

``python -m experiments.setup.pretrain_clip [--out FOLDER]`` takes about six minutes on two CPU cores, and writes the
folder ``nano_clip`` as transformers has it. It is no CLIP of the world: its images are the glyphs of ``pretrain`` (no
handwriting), its words those of ``TEMPLATES`` with the names of 42 characters, a digit as a word or as a sign. Each
step scores images against the names of all characters in one template, and its loss is the cross-entropy over them
(among texts of a batch, as CLIP has it, the same name would stand more than once).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.setup.backbone import BUILT_IN
from experiments.setup.digits import SIDE, digits
from experiments.setup.pretrain import (
    BATCH,
    CHARACTERS,
    DIGITS,
    HELD_OUT,
    LETTERS,
    MEAN,
    PATCH,
    STD,
    STEPS,
    batch,
    descended,
    fields,
    positions,
    write,
)
from models import clip_files, tables, tokenizer
from models.clip import PROMPT, Text, text_features
from models.vit import ViT, normalise, vit

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NAMES = [(*WORDS, *map("{} {}".format, ["capital" if x.isupper() else "small" for x in LETTERS], LETTERS))]
NAMES += [(*DIGITS, *NAMES[0][10:])]
TEMPLATES = (PROMPT, "{}", "a {}.", "a picture of the {}.", "an image of a printed {}.", "the sign {}.")
UNSEEN = "an image of the {}."  # of words that it knows
LENGTH, PROJECTION = 16, 32  # tokens of the longest text; width of the features
WIDTH, DEPTH, HEADS, MLP = 64, 2, 4, 128  # of the text tower
SCALE = 14.0  # where exp(logit_scale) starts: CLIP, section 2.5; at most 100, as there


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.setup.pretrain_clip", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=BUILT_IN["clip"].parent, help="folder (default: %(default)s)")
    path = parser.parse_args().out / BUILT_IN["clip"].name
    train, held_out = fields()
    params = pretrain(train)
    save(path, params)
    size = sum(file.stat().st_size for file in path.iterdir())
    print(f"wrote {path} ({size / 2**20:.2f} MB)")
    report(params, held_out)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens' numbers, and what joins bytes to the words of templates and names, the most frequent pair first.

    Pairs that are as frequent are in the order of their letters; the package's own trainer takes another.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    texts = [template.format(name) for template in TEMPLATES for names in NAMES for name in names]
    none = tokenizer.built({}, []).own
    cut = lambda text: none.pre_tokenizer.pre_tokenize_str(none.normalizer.normalize_str(text))
    words = Counter(word for text in texts for word, _ in cut(text))
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


def pretrain(glyphs: np.ndarray, steps: int = STEPS) -> dict[str, Any]:
    """``{"image", "text", "logit_scale"}``, parameters of both towers; ``steps`` a multiple of ``pretrain.SCAN``."""
    words = tokenizer.built(*vocabulary())
    image, text = towers(len(words.ids))
    of_image, of_text, data_key = jax.random.split(jax.random.key(0), 3)
    params: dict[str, Any] = dict(image.init(of_image, jnp.zeros((1, SIDE, SIDE, 3)))["params"])
    params["pos"] = params["pos"].at[1:].set(positions(*params["pos"][1:].shape))
    texts = [template.format(name) for template in TEMPLATES for names in NAMES for name in names]
    tokens, ends = (jnp.asarray(x) for x in words.encode_all(texts, LENGTH))
    told = {"tokens": tokens.reshape(len(TEMPLATES), 2, len(CHARACTERS), -1), "ends": ends.reshape(-1, 2, 42)}
    start = {
        "image": without_head(params),
        "text": text.init(of_text, tokens[:1], ends[:1])["params"],
        "logit_scale": jnp.log(jnp.full((), SCALE)),
    }
    drawn, characters = jnp.asarray(glyphs, jnp.float32), jnp.arange(len(CHARACTERS))

    def loss_fn(params, key):
        of_batch, of_template, of_names = jax.random.split(key, 3)
        x, y = batch(of_batch, drawn, BATCH)
        template = jax.random.randint(of_template, (), 0, len(TEMPLATES))
        names = jax.random.randint(of_names, characters.shape, 0, 2)
        own = jax.tree.map(lambda x: x[template, names, characters], told)
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


def save(path: Path, params: dict[str, Any]) -> None:
    """Write the folder: arrays in half precision, the configuration, and the vocabulary."""
    from safetensors.numpy import save as packed

    ids, merges = vocabulary()
    image, _ = towers(len(ids))
    own = {**params["image"], "cls": params["image"]["cls"][0], "logit_scale": params["logit_scale"]}
    arrays = tables.write_params(clip_files.HUGGING_FACE.image, own, PATCH)
    arrays |= tables.write_params(clip_files.HUGGING_FACE.text, params["text"], 1)
    arrays = {name: np.array(x, np.float16, order="C") for name, x in arrays.items()}
    about = {"source": "glyphs (digits, letters) of the fonts bundled with matplotlib, and their names"}
    about |= {"licence": "Apache-2.0", "command": "python -m experiments.setup.pretrain_clip", "format": "pt"}
    both = {"layer_norm_eps": image.epsilon, "hidden_act": image.act}
    seen = {"hidden_size": image.width, "num_hidden_layers": image.depth, "num_attention_heads": image.heads}
    seen |= {"intermediate_size": image.mlp_width, "image_size": SIDE, "patch_size": PATCH, **both}
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


def report(params: dict[str, Any], held_out: np.ndarray) -> None:
    """Print accuracy among the digits, with each way of calling them, on fonts and handwriting it has never seen."""
    words = tokenizer.built(*vocabulary())
    image, text = towers(len(words.ids))
    seen = jax.jit(lambda x: features(image, params["image"], x))
    printed = jax.jit(lambda key: batch(key, jnp.asarray(held_out, jnp.float32), 2000))(jax.random.key(1))
    data = digits()
    training = data["split"] == 0
    of_hand = seen(normalise(data["x"][training], MEAN, STD)), data["y"][training]
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
