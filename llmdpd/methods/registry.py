"""From a configuration to the agent of its method."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from llmdpd.methods.base import Agent
from llmdpd.methods.bc import Cloning
from llmdpd.methods.cql import CQL
from llmdpd.methods.decision_transformer.method import SequenceCloning
from llmdpd.methods.decision_transformer.network import DecisionTransformer
from llmdpd.methods.lamo.method import LaMo, load_language
from llmdpd.methods.lamo.network import LanguageDecisionTransformer
from llmdpd.methods.llmdpd.method import LLMDPD
from llmdpd.methods.mtdiff.method import MTDiff
from llmdpd.methods.mtdiff.network import MTDiffPolicy
from llmdpd.methods.networks import ONLINE
from llmdpd.methods.sac import SAC
from llmdpd.methods.td3_bc.method import TD3BC
from llmdpd.methods.td3_bc.state_augmentation import RAD, S4RL
from llmdpd.methods.trajectory_diffusion.method import TrajectoryDiffusion
from llmdpd.methods.trajectory_diffusion.network import PlanPolicy
from llmdpd.nn.actor import DeterministicPolicy, GaussianPolicy, SACActor, SquashedGaussianPolicy
from llmdpd.nn.policy_network import ConditionalPolicy, PromptedNetwork
from llmdpd.tasks.specs import task_spec

if TYPE_CHECKING:
    from llmdpd.config.schema import TrainConfig

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
