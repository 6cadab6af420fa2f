"""A small random CLIP under transformers' names, the same network written from its definition, and its vocabulary."""

import json

import numpy as np
from safetensors.numpy import save_file
from tokenizers.pre_tokenizers import ByteLevel

from models.tokenizer import END, START, built

WIDTH, LENGTH, PROJECTION, HEADS = 12, 10, 6, 3
NAMES = ("cat", "giant_panda", "eel")
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
MERGES = [("a", "t</w>"), ("p", "h"), ("ph", "o"), ("c", "at</w>"), ("pho", "t"), ("o", "f</w>"), ("e", "e")]
CONFIG = {
    "model_type": "clip",
    "projection_dim": PROJECTION,
    **{
        f"{tower}_config": {
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "intermediate_size": 20,
            "layer_norm_eps": 1e-3,
            "hidden_act": "quick_gelu",
        }
        for tower in ("vision", "text")
    },
}


def vocabulary():
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{x}</w>" for x in letters), *("".join(pair) for pair in MERGES), START, END]
    return {token: i for i, token in enumerate(tokens)}


def encode(text):
    return built(vocabulary(), MERGES).encode(text)


def arrays(seed=0):
    """A random CLIP: both towers of width 12 and 2 blocks, patch 2, 4 x 4 images."""
    draw = np.random.default_rng(seed).normal
    out = {
        "vision_model.embeddings.class_embedding": draw(size=WIDTH),
        "vision_model.embeddings.patch_embedding.weight": draw(size=(WIDTH, 3, 2, 2)),
        "vision_model.embeddings.position_embedding.weight": draw(size=(5, WIDTH)),
        "text_model.embeddings.token_embedding.weight": draw(size=(len(vocabulary()), WIDTH)),
        "text_model.embeddings.position_embedding.weight": draw(size=(LENGTH, WIDTH)),
        "visual_projection.weight": draw(size=(PROJECTION, WIDTH)),
        "text_projection.weight": draw(size=(PROJECTION, WIDTH)),
        "logit_scale": np.array(0.7),
    }
    norms = ["vision_model.pre_layrnorm", "vision_model.post_layernorm", "text_model.final_layer_norm"]
    sizes = {f"self_attn.{x}_proj": (WIDTH, WIDTH) for x in ("q", "k", "v", "out")}
    sizes |= {"mlp.fc1": (20, WIDTH), "mlp.fc2": (WIDTH, 20)}
    for tower in ("vision", "text"):
        for i in range(2):
            block = f"{tower}_model.encoder.layers.{i}"
            norms += [f"{block}.layer_norm{j}" for j in (1, 2)]
            for name, shape in sizes.items():
                out |= {f"{block}.{name}.weight": 0.5 * draw(size=shape), f"{block}.{name}.bias": draw(size=shape[0])}
    out |= {f"{name}.{kind}": draw(size=WIDTH) for name in norms for kind in ("weight", "bias")}
    return {name: np.asarray(x, np.float32) for name, x in out.items()}


def as_open_clip(theirs):
    """The same under OpenCLIP's names, renamed and packed here by hand."""
    swaps = {
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding": "visual.conv1",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
        "vision_model.encoder.layers": "visual.transformer.resblocks",
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
        "text_model.encoder.layers": "transformer.resblocks",
        "layer_norm": "ln_",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    out = {}
    for name, x in theirs.items():
        for old, new in swaps.items():
            name = name.replace(old, new)
        if name in ("visual_projection.weight", "text_projection.weight"):
            out["visual.proj" if name[0] == "v" else "text_projection"] = x.T
        elif ".self_attn." not in name:
            out[name] = x
        elif ".q_proj." in name:
            kind = name.rpartition(".")[2]
            own = next(own for own, other in theirs.items() if other is x)
            parts = [theirs[own.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            out[name.replace(f"self_attn.q_proj.{kind}", f"attn.in_proj_{kind}")] = np.concatenate(parts)
    return out


OPEN_CONFIG = {
    "model_cfg": {
        "embed_dim": PROJECTION,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 4, "layers": 2, "width": WIDTH, "patch_size": 2, "head_width": 4},
        "text_cfg": {"context_length": LENGTH, "vocab_size": 521, "width": WIDTH, "heads": HEADS, "layers": 2},
    },
    "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic"},
}


def folder(path, content, config=CONFIG, name="model.safetensors", words=True):
    path.mkdir(exist_ok=True)
    save_file({name: np.array(x, order="C") for name, x in content.items()}, path / name, {"format": "pt"})
    if "model_cfg" in config:
        (path / "open_clip_config.json").write_text(json.dumps(config))
    else:
        (path / "config.json").write_text(json.dumps(config))
        (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    if words:
        (path / "vocab.json").write_text(json.dumps(vocabulary()))
        (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, MERGES)) + "\n")
    return path


def reference(w, images, rows, epsilon=1e-3, act="quick_gelu"):
    """``logit_scale f g^T`` in float64 NumPy, of uint8 images and rows of tokens, each with its end last."""
    tokens, texts = towers(w, images, rows, epsilon, act)
    return np.exp(np.float64(w["logit_scale"])) * tokens[:, 0] @ texts.T


def towers(w, images, rows, epsilon=1e-3, act="quick_gelu", context=None, bridge=None):
    """What both towers make of images ``[n, tokens, d]`` and rows of tokens ``[rows, d]``, all of length 1.

    ``context``: vectors behind the first token of every row. ``bridge``: by tower, for each block ``None`` or
    ``(D, d, M, m, U, u, s)`` of an adapter.
    """
    from scipy.special import erf

    w, bridge = {name: np.float64(x) for name, x in w.items()}, bridge or {}
    dense = lambda x, name: x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)
    gelu = {"quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)), "gelu": lambda x: x * (1 + erf(x / 2**0.5)) / 2}[act]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def adapted(y, own):
        if own is None:
            return 0
        (down, d, middle, m, up, u), s = (np.float64(x) for x in own[:6]), own[6]
        return s * (np.maximum(np.maximum(y @ down + d, 0) @ middle + m, 0) @ up + u)

    def blocks(x, tower, causal):
        for i in range(2):
            block = f"{tower}.encoder.layers.{i}"
            y = norm(x, f"{block}.layer_norm1")
            q, k, v = (dense(y, f"{block}.self_attn.{part}_proj") for part in "qkv")
            out = []
            for h in range(HEADS):
                s = slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS)
                scores = np.exp(q[:, s] @ k[:, s].T / np.sqrt(WIDTH / HEADS))
                scores = np.tril(scores) if causal else scores
                out.append(scores / scores.sum(-1, keepdims=True) @ v[:, s])
            x = x + dense(np.concatenate(out, -1), f"{block}.self_attn.out_proj")
            x = x + dense(gelu(dense(norm(x, f"{block}.layer_norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
            x = x + adapted(y, bridge.get(tower, (None, None))[i])
        return x

    def of_image(image):
        x, conv = (image / 255 - MEAN) / STD, w["vision_model.embeddings.patch_embedding.weight"]
        cut = [x[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] for i in range(2) for j in range(2)]
        tokens = [np.einsum("ochw,hwc->o", conv, part) for part in cut]
        x = np.stack([w["vision_model.embeddings.class_embedding"], *tokens])
        x = norm(x + w["vision_model.embeddings.position_embedding.weight"], "vision_model.pre_layrnorm")
        return dense(norm(blocks(x, "vision_model", False), "vision_model.post_layernorm"), "visual_projection")

    def of_text(row):
        x = w["text_model.embeddings.token_embedding.weight"][row]
        x = x if context is None else np.concatenate([x[:1], context, x[1:]])
        x = blocks(x + w["text_model.embeddings.position_embedding.weight"][: len(x)], "text_model", True)
        return dense(norm(x[-1], "text_model.final_layer_norm"), "text_projection")

    unit = lambda rows: rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return unit(np.stack([of_image(x) for x in images])), unit(np.stack([of_text(row) for row in rows]))
