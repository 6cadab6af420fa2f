"""Which wrappers have a meaning together, and in which order: one table, asked whenever one is put around a method.

The outermost wrapper sees first what clients send, and last what the server has made of it. So whatever changes uploads
or chooses among them stands outside of whatever keeps something that is made of them, or one client that sends 10^6
fills a state that the defence was meant to protect; unless clients keep a part of the same, which has to match, and
cannot know what a defence has made of their uploads. Every pair that is not refused here is right; the tests walk all.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

SERVER = frozenset({"server", "fedavgm", "fedadagrad", "fedyogi", "fedadam"})  # steps towards what was aggregated
CONTROLS = frozenset({"scaffold", "feddyn", "fedbc"})  # server and clients keep parts of one thing, made of uploads
OWN = frozenset({"clip"})  # changes each upload by itself, so that its client knows what became of it
ALIKE = frozenset({"median", "trimmed_mean", "dp"})  # one update in place of all
WEIGHED = frozenset({"krum", "trust", "geometric_median"})  # clients count anew, by what they sent
COHORT = ALIKE | WEIGHED | {"norm_bound", "over_the_air"}  # what becomes of an upload depends on the others
UPLOADS = OWN | COHORT
FAIR = frozenset({"qffl", "afl"})  # clients weigh by their losses
GENERATED = frozenset({"signature_bias", "signature_adapter"})  # learned from how each client moved
LOCAL = frozenset({"proximal", "fedlc", "fedga", "feddecorr", "dp_sgd"})  # of the local loss, no state
FIRST = frozenset({"moon", "fedlesam"})  # about the models of the method itself
KNOWN = SERVER | CONTROLS | UPLOADS | FAIR | LOCAL | GENERATED | FIRST | {"fednova"}

_SWAP = "put {inner} outside: +{outer}+{inner}"


class Refused(NamedTuple):
    """``outer(inner(m))`` for all wrappers of two sets."""

    inner: frozenset[str]
    outer: frozenset[str]
    why: str
    instead: str


def _set(*names: str) -> frozenset[str]:
    return frozenset(names)


_EXAMPLES = "noise of dp_sgd covers gradients, and not the losses that weigh clients here"
_WHOLE = "it is about the examples of a batch together, and dp_sgd looks at one at a time"
_OTHERS = "its loss of one example depends on how many others the client has, which no noise of dp_sgd covers"

REFUSED = (
    Refused(_set("dp_sgd"), FAIR | {"fedbc"}, _EXAMPLES, "leave one out"),
    Refused(FAIR | {"fedbc"}, _set("dp_sgd"), _EXAMPLES, "leave one out"),
    Refused(_set("dp_sgd"), _set("fedga", "feddecorr"), _WHOLE, "leave one out"),
    Refused(_set("fedga", "feddecorr"), _set("dp_sgd"), _WHOLE, "leave one out"),
    Refused(_set("dp_sgd"), _set("fedlc"), _OTHERS, "leave one out"),
    Refused(_set("fedlc"), _set("dp_sgd"), _OTHERS, "leave one out"),
    Refused(
        _set("dp"),
        SERVER,
        "{outer} would tell by what it does not step on who took part",
        _SWAP,
    ),
    Refused(
        GENERATED,
        _set("dp"),
        "it learns from how each client moved, of which no more than a noised mean is told",
        "leave one out",
    ),
    Refused(
        _set("dp"),
        GENERATED,
        "it learns from how each client moved, of which no more than a noised mean is told",
        "leave one out",
    ),
    Refused(
        _set("dp"),
        FAIR | {"fednova"},
        "noise of dp covers updates, and not the losses and numbers of steps that weigh clients here",
        "leave one out",
    ),
    Refused(
        FAIR | {"fednova"},
        _set("dp"),
        "noise of dp covers updates, and not the losses and numbers of steps that weigh clients here",
        "leave one out",
    ),
    Refused(
        KNOWN - FIRST,
        FIRST,
        "{outer} is about the models of the method itself, as it is sent and as clients carry it",
        "put {outer} first: +{outer}+{inner}",
    ),
    Refused(
        FIRST,
        FIRST,
        "both are about the models of the method itself, and neither knows what the other makes of them",
        "leave one out",
    ),
    Refused(
        _set("fedga"),
        _set("feddecorr"),
        "FedGA takes the place of the loss, and nothing would be left of what {outer} adds to it",
        _SWAP,
    ),
    Refused(
        SERVER,
        SERVER,
        "a server takes the steps of one optimizer",
        "leave one out, or give fedopt.server one optax chain",
    ),
    Refused(
        CONTROLS,
        CONTROLS,
        "both correct what clients learn apart, and neither knows the terms or weights of the other",
        "leave one out",
    ),
    Refused(
        SERVER,
        _set("feddyn"),
        "w_g = mean of w_i - h / al needs the mean itself, not the steps that {inner} takes towards it",
        _SWAP,
    ),
    Refused(
        _set("proximal", "feddyn"),
        _set("proximal", "feddyn"),
        "FedDyn holds that term already, and its h follows from al alone",
        "leave proximal out and raise al",
    ),
    Refused(
        OWN,
        CONTROLS,
        "{outer} would keep what clients sent before {inner}, so that one client that sends too much fills it",
        _SWAP,
    ),
    Refused(
        COHORT,
        CONTROLS,
        "{outer} would keep what clients sent before {inner}, so that one client that sends too much fills it, and in "
        "the other order clients cannot know their part of it",
        "leave one out, or bound what clients send by clip: +{outer}+clip",
    ),
    Refused(
        CONTROLS,
        COHORT,
        "clients keep their part of {inner} as made of what they sent, and cannot know what {outer} made of that",
        "leave one out, or bound what clients send by clip: +{inner}+clip",
    ),
    Refused(
        FAIR,
        FAIR,
        "both weigh clients by their losses, each to an end of its own",
        "leave one out",
    ),
    Refused(
        FAIR,
        CONTROLS,
        "{outer} holds clients to what their mean is by examples, and {inner} weighs them by their losses",
        "leave one out",
    ),
    Refused(
        CONTROLS,
        FAIR,
        "{inner} holds clients to what their mean is by examples, and {outer} weighs them by their losses",
        "leave one out",
    ),
    Refused(
        FAIR,
        ALIKE,
        "behind {outer} all updates are alike, and no weight of {inner} changes their mean",
        "leave one out",
    ),
    Refused(
        ALIKE,
        FAIR,
        "{inner} counts every client alike, whatever {outer} makes of their weights",
        "leave one out",
    ),
    Refused(
        _set("fednova", "feddyn"),
        _set("fednova", "feddyn"),
        "w_g = mean of w_i - h / al needs the mean itself, and not that of updates per step",
        "leave one out",
    ),
    Refused(
        _set("scaffold", "fedbc"),
        _set("fednova"),
        "clients keep their part of {inner} as made of what they sent, and {outer} gives it another length",
        _SWAP,
    ),
    Refused(
        _set("fednova"),
        ALIKE,
        "behind {outer} all updates are alike, and {inner} would divide them by numbers of steps that are not theirs",
        _SWAP,
    ),
    Refused(
        (UPLOADS - ALIKE) | {"fednova"},
        GENERATED,
        "it would learn from what clients sent before {inner}",
        _SWAP,
    ),
    Refused(
        ALIKE,
        GENERATED,
        "it would learn from what clients sent before {inner}, and in the other order nothing of it is left",
        "take krum, norm_bound or clip instead, outside: +{outer}+krum",
    ),
    Refused(
        GENERATED,
        ALIKE,
        "it learns from how each client moved, and {outer} makes all of them alike",
        "take krum, norm_bound or clip instead: +{inner}+krum",
    ),
    Refused(
        FAIR | {"fedbc"},
        GENERATED,
        "{inner} weighs clients anew, and what is learned outside of it would be learned by other weights than the "
        "model",
        _SWAP,
    ),
    Refused(
        _set("krum", "trust", "fedbc"),
        SERVER,
        "{inner} gives clients the weight zero, and {outer} would take what these alone hold for moved",
        _SWAP,
    ),
    Refused(
        _set("clip"),
        _set("dp"),
        "dp bounds updates itself, and clip would cut its noise away again",
        _SWAP,
    ),
    Refused(
        _set("dp"),
        COHORT,
        "one client can move what {outer} makes of all by more than its own bounded update, which no noise behind it "
        "accounts for",
        "leave one out",
    ),
    Refused(
        COHORT,
        _set("dp"),
        "behind {outer} all updates are alike, and nothing is left for {inner}",
        "leave one out",
    ),
    Refused(
        ALIKE,
        ALIKE,
        "behind {outer} all updates are alike, and nothing is left for {inner}",
        "leave one out",
    ),
    Refused(
        COHORT - ALIKE,
        ALIKE,
        "behind {outer} all updates are alike, and nothing is left for {inner}",
        _SWAP,
    ),
)

_WITHOUT_UPLOADS = frozenset({"fedlc", "fedga", "feddecorr"})  # the only ones that mean something then


def check(name: str, stack: tuple[str, ...], uploads: Literal["averaged", "stacked", "none"] = "averaged") -> None:
    """Refuse to put the wrapper ``name`` around a method with the wrappers ``stack``, from the innermost.

    A wrapper that the table does not know may stand anywhere.

    Args:
      name, stack: as on the command line.
      uploads: ``Method.uploads``.

    Raises:
      ValueError: says which two do not go together, why, and what does.
    """
    if uploads == "none" and name in KNOWN - _WITHOUT_UPLOADS:
        raise ValueError(
            f"{name} works by what clients send, and clients of this method send no adapters: leave it out, or wrap a "
            "method that aggregates adapters, such as fedit"
        )
    if uploads == "stacked" and name in ALIKE:
        raise ValueError(
            f"{name} takes factors entry by entry, and the server of this method stacks every client's own product, of "
            "which nothing would be left: take krum, norm_bound or clip, or wrap a method that averages, such as fedit"
        )
    for inner in stack:
        if inner == name:
            raise ValueError(f"{name} is there twice, and once says all: leave one out (+{name}+{name})")
        for rule in REFUSED:
            if inner in rule.inner and name in rule.outer:
                why, instead = (text.format(inner=inner, outer=name) for text in (rule.why, rule.instead))
                raise ValueError(f"{name} around {inner} (+{inner}+{name}) is refused: {why}. Instead, {instead}")
