# %% [markdown]
# # From Hugging Face to PEFT and back
#
# Weights as `transformers` saves them are federated, and what was learned is a folder that `peft` loads: its logits are
# ours. Needs `torch`, `transformers` and `peft`; the model is small and random, so that nothing is downloaded. With a
# published one the folder is `hf:google/vit-base-patch16-224` or what `save_pretrained` wrote.

# %%
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import torch
import transformers
from fedlora_jax.models.families import find

import fedlora_jax as fl
from fedlora_jax import lora
from fedlora_jax.models import peft as adapters  # type: ignore

SIDE, CLASSES, MEAN, STD = 16, 3, 0.5, 0.25
folder = Path(tempfile.mkdtemp())
torch.manual_seed(0)
sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
theirs = transformers.ViTForImageClassification(
    transformers.ViTConfig(**sizes, image_size=SIDE, patch_size=4, num_labels=CLASSES)
).eval()
theirs.save_pretrained(folder / "weights")
processor = {"image_mean": [MEAN] * 3, "image_std": [STD] * 3, "rescale_factor": 1 / 255}
(folder / "weights" / "preprocessor_config.json").write_text(json.dumps(processor))

# %% [markdown]
# **In.** Every array is used or refused by name; mean, deviation, heads and epsilon are read from the files beside the
# weights. The head is a new one, for the classes of one's own data.

# %%
backbone = find(None, folder / "weights")(folder / "weights", CLASSES, SIDE)
images = np.random.default_rng(0).integers(0, 256, (60, SIDE, SIDE, 3)).astype(np.uint8)
labels = images.mean((1, 2)).argmax(-1)  # which colour there is most of


shown = torch.tensor((images / 255 - MEAN) / STD, dtype=torch.float32).permute(0, 3, 1, 2)


def logits_of_theirs(model):
    with torch.no_grad():
        return model(shown).logits.numpy()


adapter = lora.new(jax.random.key(0), backbone.params, 4, targets=backbone.targets["all"], full="^head/", scale=2.0)
ours = backbone.apply(backbone.params, adapter, images)[1]
with torch.no_grad():
    features = theirs.vit(shown).last_hidden_state[:, 0].numpy()
print("before training the features differ by", float(np.abs(ours - features).max()))
np.testing.assert_allclose(ours, features, atol=1e-4)

# %% [markdown]
# **Federated.** Six clients of ten images, three rounds.


# %%
def loss_fn(base, adapter, batch, key):
    logits, _ = backbone.apply(base, adapter, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


clients = fl.Population(jnp.arange(60).reshape(6, 10), jnp.full(6, 10), jnp.full(6, 4))
step = fl.make_step(fl.make_round(fl.fedit(), loss_fn, optax.adam(3e-3)), participants=6, steps=4, batch=5, smallest=10)
run = fl.rounds.start(fl.fedit(), jax.random.key(1), adapter, clients=6)
data = (jnp.asarray(images), jnp.asarray(labels))
run, info = jax.jit(fl.scan_rounds(step, 3))(backbone.params, data, clients, run, jax.random.key(2))
print("loss", np.round(info.loss.mean(1), 3))

# %% [markdown]
# **Back.** PEFT's files, by the names that `transformers` has for the modules.

# %%
layout = next(iter(backbone.layouts.values()))
(folder / "adapter").mkdir()
for name, content in adapters.files_of(layout, backbone.params, run.state.adapter, {}).items():
    (folder / "adapter" / name).write_bytes(content)
whole = peft.PeftModel.from_pretrained(theirs, str(folder / "adapter"))
ours = backbone.apply(backbone.params, run.state.adapter, images)[0]
np.testing.assert_allclose(ours, logits_of_theirs(whole), atol=1e-3)
print("after training PEFT's logits differ from ours by", float(np.abs(ours - logits_of_theirs(whole)).max()))

# %% [markdown]
# On the command line: `compare --weights hf:OWNER/NAME`, then `export RUN --to peft`; `--adapter FOLDER` begins
# with what PEFT has written.
