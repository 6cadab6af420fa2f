"""Models of your own for the command line: flax linen, flax NNX, and a plain function of arrays.

    python -m experiments models --model examples/own_backbones.py:cnn
    python -m experiments compare --methods fedit,flexlora --model examples/own_backbones.py:nnx_cnn

Each function is given what it asks for by name (``classes``, ``image_size``, ``weights``, ...) and returns a
``Backbone``: a name, parameters as nested dicts of arrays, a function of parameters, adapter and images (uint8), and
sets of kernels by name; where ``--targets`` does not say, ``default`` is adapted. Here parameters are random; in
earnest they are those of a trained model.
"""

import jax
import jax.numpy as jnp
from fedlora_jax.models.backbone import Backbone
from flax import linen as nn
from flax import nnx

from fedlora_jax import Dense, lora


def seen(images):
    """As the models see them; who needs a mean and a deviation takes them off here."""
    return images.astype(jnp.float32) / 255


class CNN(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x):
        for width in (8, 16):
            x = nn.relu(nn.Conv(width, (3, 3), strides=2)(x))
        x = nn.relu(Dense(12, name="neck")(x.mean((-3, -2))))  # nn.Dense that looks for its adapter
        return Dense(self.classes, name="head")(x), x


def cnn(classes, image_size):
    """Linen: adapters of ``Dense`` layers are computed apart from the frozen kernels, which all clients share."""
    model = CNN(len(classes))
    params = model.init(jax.random.key(0), jnp.zeros((1, image_size, image_size, 3)))["params"]

    def apply(params, adapter, images, *, training=False):
        return model.apply(lora.variables(params, adapter), seen(images))

    return Backbone("a linen CNN", params, apply, targets={"default": ["neck/kernel"]})


class NNXCNN(nnx.Module):
    def __init__(self, classes, rngs):
        conv = lambda n_in, n_out: nnx.Conv(n_in, n_out, (3, 3), strides=2, rngs=rngs)
        self.convs = nnx.List([conv(3, 8), conv(8, 16)])
        self.neck = nnx.Linear(16, 12, rngs=rngs)
        self.head = nnx.Linear(12, classes, rngs=rngs)

    def __call__(self, x):
        for conv in self.convs:
            x = nnx.relu(conv(x))
        features = nnx.relu(self.neck(x.mean((-3, -2))))
        return self.head(features), features


def nnx_cnn(classes):
    """NNX: what is trained is split off as a pure dict, and put back with the adapter folded in.

    A model that counts or drops something is put into ``model.eval()`` first, and ``rest`` is made anew in ``apply``,
    ``jax.tree.map(jnp.asarray, rest)``: NNX changes no variable of another trace.
    """
    model = NNXCNN(len(classes), nnx.Rngs(0))
    graph, state, rest = nnx.split(model, nnx.Param, ...)

    def apply(params, adapter, images, *, training=False):
        merged = nnx.restore_int_paths(lora.merge(params, adapter))
        return nnx.merge(graph, merged, rest)(seen(images))

    return Backbone("an NNX CNN", named(nnx.to_pure_dict(state)), apply, targets={"default": ["neck/kernel"]})


def named(tree):
    """Positions in lists as strings, of which ``nnx.restore_int_paths`` makes integers again."""
    return {str(key): named(x) for key, x in tree.items()} if isinstance(tree, dict) else tree


def plain(classes, image_size):
    """A function of arrays: anything that computes with ``lora.merge(params, adapter)``, in whatever library."""
    inputs, width = 3 * image_size**2, 32
    params = {
        "hidden": {"kernel": jax.random.normal(jax.random.key(0), (inputs, width)) / inputs**0.5},
        "head": {"kernel": jnp.zeros((width, len(classes))), "bias": jnp.zeros(len(classes))},
    }

    def apply(params, adapter, images, *, training=False):
        merged = lora.merge(params, adapter)
        features = jnp.tanh(seen(images).reshape(len(images), -1) @ merged["hidden"]["kernel"])
        return features @ merged["head"]["kernel"] + merged["head"]["bias"], features

    return Backbone("a plain function", params, apply, targets={"default": ["hidden/kernel"]})
