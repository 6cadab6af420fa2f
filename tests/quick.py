"""What programs are compiled with where tests look at anything but their speed: quickly, to run slowly.

Tiny problems run in no time. The process that tests has this in its environment, and may give it to those it starts,
which then find what it compiled. (A later jaxlib may have one emitter alone, and would stop at a flag that it does not
know.)
"""

import os
from importlib.metadata import version

FLAGS = "--xla_cpu_parallel_codegen_split_count=1"
FLAGS += " --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()}
GIVEN = {name: os.environ[name] for name in QUICK if name in os.environ}
