"""Who computes the same round: one module for each, with ``contender(work, chunk) -> Contender``.

``INSTALL`` says what each needs beside this repository, ``NEEDS`` which modules that brings. None of it is needed for
anything else; a second virtual environment, named by ``bench peers --python``, keeps it apart.
"""

INSTALL = {
    "fedlora_jax": "-e .",
    "torch_peft": "torch transformers>=5 peft",
    "torch_vmap": "torch",
    "torch_compile": "torch",
    "flwr": "torch transformers>=5 peft flwr[simulation]",
    "fedjax": "fedjax 'jax<0.6' 'flax<0.12' optax orbax-checkpoint scikit-learn matplotlib safetensors tqdm",
}
NEEDS = {
    "fedlora_jax": ("jax", "flax", "optax"),
    "torch_peft": ("torch", "transformers", "peft"),
    "torch_vmap": ("torch",),
    "torch_compile": ("torch",),
    "flwr": ("torch", "transformers", "peft", "flwr", "ray"),
    "fedjax": ("fedjax", "jax"),
}
