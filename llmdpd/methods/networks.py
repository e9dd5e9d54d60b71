"""The methods by name, and the network that each of them trains and acts with."""

from __future__ import annotations

from typing import Literal, get_args

from llmdpd.errors import InputError
from llmdpd.methods.decision_transformer.network import DecisionTransformer, PromptDecisionTransformer
from llmdpd.methods.lamo.network import LanguageDecisionTransformer
from llmdpd.methods.mtdiff.network import MTDiffPolicy
from llmdpd.methods.trajectory_diffusion.network import PlanPolicy
from llmdpd.nn.actor import DeterministicPolicy, GaussianPolicy, SACActor, SquashedGaussianPolicy
from llmdpd.nn.history_policy import HistoryPolicy
from llmdpd.nn.policy_network import ConditionalPolicy, PolicyConfig, PromptedNetwork

Method = Literal[
    "llmdpd",
    "trajectory-diffusion",
    "diffusion-ql",
    "diffusion-bc",
    "bc",
    "td3-bc",
    "rad",
    "s4rl",
    "cql",
    "dt",
    "prompt-dt",
    "mtdiff",
    "lamo",
    "sac",
]

_NETWORKS: dict[str, type[PromptedNetwork]] = {
    "llmdpd": ConditionalPolicy,
    "trajectory-diffusion": PlanPolicy,
    "diffusion-ql": ConditionalPolicy,
    "diffusion-bc": ConditionalPolicy,
    "bc": GaussianPolicy,
    "td3-bc": DeterministicPolicy,
    "rad": DeterministicPolicy,
    "s4rl": DeterministicPolicy,
    "cql": SquashedGaussianPolicy,
    "dt": DecisionTransformer,
    "prompt-dt": PromptDecisionTransformer,
    "mtdiff": MTDiffPolicy,
    "lamo": LanguageDecisionTransformer,
    "sac": SACActor,
}
METHODS: dict[str, Method] = {name: name for name in get_args(Method)}
POLICY_DIFFUSION = tuple(name for name, kind in _NETWORKS.items() if kind is ConditionalPolicy)
"""The methods whose policy is a diffusion of actions."""
SEQUENCE_MODELS = tuple(name for name, kind in _NETWORKS.items() if issubclass(kind, DecisionTransformer))
"""The methods that are Decision Transformers."""
ONLINE = tuple(name for name, kind in _NETWORKS.items() if issubclass(kind, SACActor))
"""The methods that learn in the environment itself, from no data set."""
ASKED = tuple(name for name, kind in _NETWORKS.items() if issubclass(kind, HistoryPolicy))
"""The methods whose policy is shown an episode's last steps and asked for a return."""


def make_network(
    method: str, state_dim: int, action_dim: int, embedding_dim: int, config: PolicyConfig
) -> PromptedNetwork:
    """The method's network.

    Args:
        state_dim: S. action_dim: A. embedding_dim: D, of the LLM's embeddings.
        config: see `PolicyConfig`.

    Raises:
        InputError: an unknown method.
    """
    if method not in _NETWORKS:
        raise InputError("unknown method", field="method", found=method, expected=", ".join(get_args(Method)))
    network = _NETWORKS[method](state_dim, action_dim, embedding_dim, config)
    network.method = method
    return network


def method_of(network: PromptedNetwork) -> str:
    """The method that the network was made for, or the first one that trains such a network."""
    return network.method or next(name for name, kind in _NETWORKS.items() if type(network) is kind)
