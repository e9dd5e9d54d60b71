"""From a configuration to the agent of its method."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from llmdpd.agents.base import Agent
from llmdpd.agents.cloning import Cloning
from llmdpd.agents.cql import CQL
from llmdpd.agents.decision_transformer import SequenceCloning
from llmdpd.agents.lamo import LaMo, load_language
from llmdpd.agents.llmdpd import LLMDPD
from llmdpd.agents.mtdiff import MTDiff
from llmdpd.agents.sac import SAC
from llmdpd.agents.state_augmentation import RAD, S4RL
from llmdpd.agents.td3_bc import TD3BC
from llmdpd.agents.trajectory_diffusion import TrajectoryDiffusion
from llmdpd.envs.specs import task_spec
from llmdpd.networks.actor_policy import DeterministicPolicy, GaussianPolicy, SACActor, SquashedGaussianPolicy
from llmdpd.networks.decision_transformer import DecisionTransformer
from llmdpd.networks.language_transformer import LanguageDecisionTransformer
from llmdpd.networks.methods import ONLINE
from llmdpd.networks.mtdiff_policy import MTDiffPolicy
from llmdpd.networks.plan_policy import PlanPolicy
from llmdpd.networks.policy_network import ConditionalPolicy, PromptedNetwork

if TYPE_CHECKING:
    from llmdpd.config import TrainConfig

AnyAgent = LLMDPD | Agent
"""What learns from batches of a data set."""


def make_online_agent(config: TrainConfig, network: SACActor) -> SAC:
    """The agent of a method of `ONLINE`: it learns in the environments of the seen tasks, and acts by the network.

    Raises:
        InputError: stable-baselines3 is not installed.
    """
    return SAC(
        network,
        config.sac,
        [task_spec(task) for task in config.tasks.seen],
        steps=config.training.iterations,
        batch_size=config.training.batch_size,
        seed=config.seed,
        goal_visible=config.tasks.goal_visible,
    )


def make_agent(config: TrainConfig, network: PromptedNetwork) -> AnyAgent:
    """The agent of a method that learns from a data set, with the network that `make_network` made for it.

    Raises:
        InputError: a language model or a corpus that is not there, or does not fit (lamo).
        ValueError: a method of `ONLINE`.
    """
    method, iterations = config.method, config.training.iterations
    if method in ONLINE:
        raise ValueError(f"{method} learns in the environment: make_online_agent")
    if method == "trajectory-diffusion":
        return TrajectoryDiffusion(cast(PlanPolicy, network), config.planner, iterations)
    if method == "bc":
        return Cloning(cast(GaussianPolicy, network), config.bc, iterations)
    if isinstance(network, LanguageDecisionTransformer):
        return LaMo(network, config.lamo, iterations, load_language(config.lamo, network))
    if isinstance(network, DecisionTransformer):
        return SequenceCloning(network, config.dt, iterations)
    if isinstance(network, MTDiffPolicy):
        return MTDiff(network, config.mtdiff, iterations)
    if method == "cql":
        return CQL(cast(SquashedGaussianPolicy, network), config.cql, iterations)
    if method in ("td3-bc", "rad", "s4rl"):
        augmentation = {"rad": RAD(config.rad), "s4rl": S4RL(config.s4rl)}.get(method)
        return TD3BC(cast(DeterministicPolicy, network), config.td3_bc, iterations, augmentation)
    return LLMDPD(cast(ConditionalPolicy, network), config.agent, iterations)
