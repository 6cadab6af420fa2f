"""The learned parts of HyperLoRA as pure functions of their parameters, each with an exact neutral setting.

*Amortizing Federated Adaptation: Hypernetwork Driven LoRA for Personalized Foundation Models*, Gupta, Shanker and
Sethi, 2026, arXiv 2606.06154, names the parts (generator G, synthesizer S, corrector C) and their roles. Their
architectures are not public: what is here is our design, made so that at initialisation the whole is FlexLoRA. By
default G speaks for the head's bias and S takes server steps; the networks of all three, which have not earned their
place in any comparison so far (docs/hyperlora.md), are options.
"""

from fedlora_jax.hyper import corrector, generator, synthesizer

__all__ = ["corrector", "generator", "synthesizer"]
