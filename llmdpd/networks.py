"""The methods by name, and the network that each of them trains and acts with."""

from __future__ import annotations

from typing import Literal, get_args

from llmdpd.errors import InputError
from llmdpd.plan_policy import PlanPolicy
from llmdpd.policy_network import ConditionalPolicy, PolicyConfig, PromptedNetwork

Method = Literal["llmdpd", "trajectory-diffusion"]

_NETWORKS: dict[str, type[PromptedNetwork]] = {"llmdpd": ConditionalPolicy, "trajectory-diffusion": PlanPolicy}


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
    return _NETWORKS[method](state_dim, action_dim, embedding_dim, config)


def method_of(network: PromptedNetwork) -> str:
    """The method that trains such a network."""
    return next(name for name, kind in _NETWORKS.items() if type(network) is kind)
