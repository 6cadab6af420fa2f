"""Baselines of federated CLIP on the built-in two-tower model, in one table: local, base and novel accuracy.

``python examples/clip_baselines.py [FOLDER]`` runs ``python -m experiments compare`` for each model below and writes
the table of docs/clip.md. A run that FOLDER (``runs/clip``) has already is not run again, one that was ended goes on.
Each row has the learning rate that was chosen for it on seeds apart (docs/clip.md says how).
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from experiments.results import finished, summary  # noqa: E402

PROTOCOL = (
    "--model clip --novel half --partition classes:2 --shots 16 --clients 10 --holdout-clients 0 --minimum 4 "
    "--rounds 20 --eval-every 20 --checkpoint-every 20 --local-steps 4 --batch 16 --seeds 5"
)
EVERYTHING = "hyperlora:form=mix:server=full:factors=balanced"  # its networks, which say what signatures tell
IMAGE = "--head zero_shot --full="  # what is trained are low-rank updates in the image tower
WORDS = "--context=a photo of a"  # vectors that begin as words
MODELS = [  # title, options with spaces between them (one with spaces of its own stands apart), rate, methods
    ("zero-shot", [IMAGE], 0.1, ["frozen"]),
    ("LoRA in the image tower", [IMAGE], 0.3, ["fedit"]),
    ("", [IMAGE], 0.1, [EVERYTHING, "hilora", "fedvlm", "local_only"]),
    ("HyperLoRA, shuffled signatures", [IMAGE, "--signature shuffled"], 0.1, [EVERYTHING]),
    ("HyperLoRA, constant signatures", [IMAGE, "--signature constant"], 0.1, [EVERYTHING]),
    ("HyperLoRA, random signatures", [IMAGE, "--signature random"], 0.1, [EVERYTHING]),
    ("LoRA in the text tower", ["--head text --targets text_qv --full="], 0.3, ["fedit"]),
    ("LoRA in both", ["--head text --targets qv --full="], 0.3, ["fedit"]),
    ("PromptFL", ["--head text --context 4 --targets= --full ^head/context"], 0.1, ["fedit", "local_only"]),
    ("PromptFL from words", ["--head text --targets= --full ^head/context", WORDS], 0.3, ["fedit"]),
    (
        "FedPGP",
        ["--head text --full ^head/context$ --targets text/own --rank 4 --scale 1 --contrast 0.5", WORDS],
        0.1,
        ["fedpgp"],
    ),
    (
        "FedOTP",
        ["--head transport --context 4 --targets= --full ^head/(context|local)"],
        0.03,
        ["fedper:stays=local"],
    ),
    (
        "pFedMMA",
        ["--head text --bridge 2:8:0.1 --targets= --full ^bridge/,bridge/(down|up)/"],
        0.1,
        ["fedper:stays=blocks.bridge"],
    ),
    (
        "LoRA in the image tower, words of one's own",
        ["--head text --targets image_qv --full ^head/context", WORDS],
        0.3,
        ["fedper"],
    ),
    ("FedCLIP", ["--head gate --targets= --full ^head/gate/"], 0.3, ["fedit"]),
    ("linear probe", ["--head linear --targets= --full ^head/"], 0.3, ["fedit"]),
]
COLUMNS = {
    "personal_accuracy": "local",
    "personal_accuracy_tuned": "+steps",
    "base_accuracy": "base",
    "novel_accuracy": "novel",
    "harmonic_mean": "HM",
}


def main(folder: Path) -> None:
    lines = [f"| model | method | rate | {' | '.join(COLUMNS.values())} | KiB up |", "|---" * (len(COLUMNS) + 4) + "|"]
    for i, (title, options, rate, methods) in enumerate(MODELS):
        out = folder / f"{i:02}"
        words = [word for part in options for word in ([part] if part == WORDS else part.split())]
        command = ["compare", *PROTOCOL.split(), *words, "--lr", str(rate), "--methods", ",".join(methods)]
        if not (out / finished.SUMMARY).exists():
            again = ["--resume"] if out.exists() else []
            subprocess.run(
                [sys.executable, "-m", "experiments", *command, "--out", str(out.resolve()), *again],
                cwd=ROOT,
                check=True,
            )
        entries = finished.load(out).summary["methods"]
        for j, (name, entry) in enumerate(entries.items()):
            values = [summary.percent(entry[key]["last"]) for key in COLUMNS]
            kib = f"{entry['bytes_up']['per_client_round'] / 1024:.1f}"
            lines.append(f"| {title if j == 0 else ''} | `{name}` | {rate} | {' | '.join(values)} | {kib} |")
    print("\n".join(lines))
    (folder / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/clip"))
