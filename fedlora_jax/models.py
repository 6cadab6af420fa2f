"""The models, under the one name by which every project finds them: ``from fedlora_jax.models.vit import vit``.

In a clone they lie beside this package, where ``models`` would find another package of that name before them; in the
wheel they lie inside it, in the place of this file. Nothing of the library imports them.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[1] / "models")]
