"""What a bench can be told: the only place where a default lives. Needs neither JAX nor anything else."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.options import COUNT, option

BENCHES = {
    "learning": "rounds of learned methods against plain ones, and the server's part alone",
    "round": "one FedIT round: seconds, share of the machine's peak, memory",
    "profile": "where the time of a round goes: products, entries, layout, by part of the model",
    "peers": "the same round by PyTorch, Flower and fedjax (where installed), results compared",
    "prefix": "a round that adapts the last blocks, what the others compute stored or computed in each step",
    "population": "seconds of a round of 64 clients against the size of the population, whose memory is on the host",
    "scaling": "seconds per client against the number of clients, rank, local steps and depth",
    "memory": "predicted and measured peak memory against the number of clients trained at once",
    "server": "every method's aggregation alone, at the size of ViT-B, and its share of a round",
    "compile": "seconds to trace, lower and compile each method's round, and with a persistent cache",
    "staging": "peak memory of a run that stages its images, and its rounds beside those with resident images",
    "forecast": "what --dry-run foretells of some runs, and what they take: memory and CPU seconds",
    "gpu": "round and peers' PyTorch on every work, within eight minutes on one GPU",
}

USES = {  # beside --out
    "learning": ("work", "repeats", "methods"),
    "round": ("work", "repeats", "chunk", "devices", "force"),
    "profile": ("work", "chunk", "force"),
    "peers": ("work", "repeats", "chunk", "devices", "contenders", "python", "force"),
    "prefix": ("work", "repeats", "chunk", "last"),
    "population": ("work", "repeats", "chunk", "clients"),
    "scaling": ("work", "repeats", "clients", "ranks", "local_steps", "depths"),
    "memory": ("work", "chunks", "force"),
    "server": ("work", "repeats", "kernels", "clients", "methods"),
    "compile": ("work", "methods"),
    "staging": ("work", "repeats", "images"),
    "forecast": ("runs",),
    "gpu": ("works", "repeats", "contenders", "python", "minutes", "force"),
}

CONTENDERS = ("fedlora_jax", "torch_peft", "torch_vmap", "torch_compile", "flwr", "fedjax")
RUNS = ("toy", "digits", "mixer", "photos", "hundred", "many")
LEARNING = ("fedit", "flexlora", "hyperlora", "hyperlora:mode=first_order", "hyperlora:mode=exact")
BY_DEFAULT = {  # of some benches; the others' is the field's own
    "learning": {"work": "learning", "methods": LEARNING},
    "scaling": {"work": "nano", "clients": (16, 64, 256, 1024, 4096), "repeats": 1},
    "population": {"work": "nano", "clients": (100, 1000, 10_000)},
    "staging": {"work": "photos"},
    "gpu": {"contenders": ("fedlora_jax", "torch_peft", "torch_vmap", "torch_compile")},
}


@dataclass(frozen=True)
class Options:
    """The options of all benches; each takes what ``USES`` says."""

    bench: str
    work: str = option("tiny", "the fixed work: toy, nano, tiny, learning, photos or base (experiments/bench/works.py)")
    works: tuple[str, ...] = option(("tiny", "nano", "base"), "the fixed works, comma-separated")
    repeats: int = option(3, "measurements of each program, in turns; the median is given", "[1, 1000]")
    chunk: int | None = option(None, "clients trained at once (default: as a run chooses)", COUNT)
    devices: int = option(1, "devices that share our clients, of a CPU parts of it", "[1, 1024]")
    chunks: tuple[int, ...] = option((1, 2, 4, 8, 16), "numbers of clients trained at once, comma-separated", COUNT)
    clients: tuple[int, ...] = option((8, 32, 128), "numbers of clients, comma-separated", COUNT)
    ranks: tuple[int, ...] = option((1, 4, 16, 64), "ranks, comma-separated", "[1, 100000]")
    local_steps: tuple[int, ...] = option((1, 5, 20), "numbers of local steps, comma-separated", COUNT)
    depths: tuple[int, ...] = option((1, 2, 4, 8), "numbers of blocks, comma-separated", "[1, 1000]")
    last: int = option(3, "adapted blocks, from the end", "[1, 1000]")
    kernels: str = option("base", "the work whose adapted kernels are aggregated")
    methods: tuple[str, ...] = option((), "methods, comma-separated (all, where no default is given)", empty=True)
    contenders: tuple[str, ...] = option(CONTENDERS, "who computes the round, comma-separated", among=CONTENDERS)
    python: tuple[str, ...] = option(
        (),
        "interpreters for contenders, as in torch_peft=venv/bin/python; one without a name is for all the others",
        empty=True,
    )
    runs: tuple[str, ...] = option(
        RUNS[1:], "the runs, comma-separated (experiments/bench/bench_forecast.py)", among=RUNS
    )
    images: int = option(60_000, "images that are generated", "[40, 10000000]")
    minutes: float = option(8.0, "start no further contender after so many minutes", "(0, inf)")
    force: bool = option(False, "run works that are meant for a GPU on a CPU too")
    out: str | None = option(None, "folder for bench.jsonl and a picture (default: print only)")


def interpreter(options: Options, contender: str) -> str | None:
    """The Python that runs a contender; ``None``: this one. Our own round runs with this one unless named."""
    named = dict(entry.split("=", 1) for entry in options.python if "=" in entry)
    others = [entry for entry in options.python if "=" not in entry]
    return named.get(contender, others[-1] if others and contender != "fedlora_jax" else None)
