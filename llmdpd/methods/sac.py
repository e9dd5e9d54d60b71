"""SAC (Haarnoja et al. 2018) in the environment itself, by stable-baselines3: what a policy reaches that may try."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmdpd.data.collecting.sac_trainer import EpisodeEnd, MakeEnvironment, SacTrainer, check_unit_actions, require_sac
from llmdpd.data.replay_log import ReplayLog
from llmdpd.errors import InputError, TrainingDivergedError
from llmdpd.methods.base import Learner, MethodConfig, Start
from llmdpd.nn.acting import NoisyActing
from llmdpd.nn.actor import SquashedGaussianPolicy
from llmdpd.nn.config import NetworkConfig
from llmdpd.nn.context import ContextConfig
from llmdpd.tasks.simulation.rollout import MAKE_ENVIRONMENT
from llmdpd.tasks.specs import TaskSpec
from llmdpd.utils.bounds import Bounds, Fraction, NonNegative, WholeNumber, Width


@dataclass(frozen=True)
class SACNetworkConfig(NetworkConfig):
    """SAC's actor, which sees observations as they are."""

    hidden_dim: Width = 256
    """Width of the two hidden layers."""

    def context_config(self) -> ContextConfig:
        return ContextConfig("pooled", text=False, trajectory=False, features="raw")


class SACActor(SquashedGaussianPolicy):
    """The actor of stable-baselines3's SAC (Raffin et al. 2021): two hidden layers, on observations as they are."""

    layers = 2

    @torch.no_grad()
    def copy_actor(self, actor: nn.Module) -> None:
        """Take the weights of stable-baselines3's actor: `latent_pi`, and for m and log s a layer each."""
        hidden, mean, log_std = (actor.get_submodule(name) for name in ("latent_pi", "mu", "log_std"))
        layers = [module for module in hidden if isinstance(module, nn.Linear)]  # type: ignore[attr-defined]
        *own, last = (module for module in self.net if isinstance(module, nn.Linear))
        for target, source in zip(own, layers, strict=True):
            target.weight.copy_(source.weight)
            target.bias.copy_(source.bias)
        for name in ("weight", "bias"):
            getattr(last, name).copy_(torch.cat([getattr(mean, name), getattr(log_std, name)]))


@dataclass(frozen=True)
class SACConfig(MethodConfig):
    """SAC with stable-baselines3's defaults: two hidden layers, Adam, the entropy's weight learned.

    An iteration is a step in the environment, and a gradient step on a batch of all steps so far.
    """

    name = "sac"
    legacy: ClassVar[Mapping[str, str]] = {"sac": "method."}

    network: SACNetworkConfig = field(default_factory=SACNetworkConfig)
    acting: NoisyActing = field(default_factory=NoisyActing)
    lr: NonNegative = 3e-4
    """Learning rate of actor, critics and the entropy's weight."""
    gamma: Fraction = 0.99
    """Discount a step."""
    tau: Fraction = 0.005
    """Polyak rate of the target critics, an iteration."""
    learning_starts: WholeNumber = 100
    """Steps by uniformly random actions before the first gradient step."""
    max_steps: Annotated[int | None, Bounds(1)] = None
    """Steps an episode of training at most; by default the environment's limit."""

    @classmethod
    def from_preset(cls, start: Start) -> SACConfig:
        return cls(network=SACNetworkConfig(hidden_dim=start.diffusion.network.hidden_dim))

    def check_run(self, spec: TaskSpec, iterations: int) -> None:
        check_unit_actions(spec)
        if self.max_steps is not None:
            spec.check_max_steps(self.max_steps, "max_steps")
        bound = self.network.action_bound
        if bound != 1:
            raise InputError("actions must lie within ±1", field="network.action_bound", found=bound, expected=1)
        if self.learning_starts >= iterations:
            raise InputError(
                "the run ends before the first gradient step",
                field="learning_starts",
                found=self.learning_starts,
                expected=f"below {iterations} (training.iterations)",
            )

    def require(self) -> None:
        require_sac("method")

    def shortened(self, iterations: int) -> tuple[str, ...]:
        return ("--method.learning-starts", str(iterations // 2)) if self.learning_starts >= iterations else ()

    def describe_online(self, iterations: int) -> str:
        cut = "" if self.max_steps is None else f", episodes cut at {self.max_steps}"
        steps = f"{iterations:,} steps in the environments of the tasks that it is trained on"
        return f"online: no data set; {steps}{cut} (SAC by stable-baselines3)"


class SAC(Learner):
    """The learning half of an iteration; `SACSteps`, which shares its trainer, is the other.

    Args:
        network: takes the actor's weights when it is asked for (`acting_network`); it does not learn itself.
        config: the method's options.
        specs: the tasks, alike in observations and actions; episodes go round them.
        steps: in the environment, of the whole run.
        seed: of networks, actions, batches and episodes.
        goal_visible: whether observations hold the goal, where the suite can hide it.
        make: what makes the environments; see `SacTrainer`.

    Raises:
        InputError: stable-baselines3 is not installed.
    """

    Config = SACConfig
    network_class = SACActor
    online = True
    unshared = "each of its steps in the environment depends on the one before"

    def __init__(
        self,
        network: SACActor,
        config: SACConfig,
        specs: Sequence[TaskSpec],
        *,
        steps: int,
        seed: int,
        goal_visible: bool = True,
        make: MakeEnvironment | str = MAKE_ENVIRONMENT,
    ) -> None:
        self._network = network.eval().requires_grad_(False)
        self._has_success = specs[0].has_success
        settings: dict[str, Any] = {
            name: getattr(config, name) for name in ("gamma", "tau", "learning_starts", "batch_size")
        }
        settings["learning_rate"] = config.lr
        settings["policy_kwargs"] = {"net_arch": [config.network.hidden_dim] * network.layers}
        self.trainer = SacTrainer(
            specs, seed, steps, max_steps=config.max_steps, goal_visible=goal_visible, settings=settings, make=make
        )

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return self.trainer.modules

    @property
    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        return self.trainer.optimizers

    @property
    def acting_network(self) -> SACActor:
        self._network.copy_actor(self.trainer.actor)
        return self._network

    @classmethod
    def in_environments(
        cls, network: SACActor, config: SACConfig, specs: Sequence[TaskSpec], *, folder: Path, **options: Any
    ) -> tuple[SAC, SACSteps]:
        learner = cls(network, config, specs, **options)
        return learner, SACSteps(learner, folder)

    def visited_states(self) -> NDArray[np.float32]:
        return self.trainer.transitions()["observations"]

    def update(self, batch: EpisodeEnd | None, iteration: int) -> dict[str, Tensor]:
        """A gradient step after the environment's; `batch` is the episode that ended with that, if one did.

        Returns its losses, none in the warm-up; of an episode that ended its return, and its success if tasks have one.

        Raises:
            TrainingDivergedError: NaN or Inf in the actor's weights.
        """
        with _naming_divergence(self.trainer, iteration):
            metrics = self.trainer.learn()
        if batch is not None:
            metrics["rollout/return"] = batch.episode_return
            if self._has_success:
                metrics["rollout/success"] = float(batch.success)
        return {name: torch.tensor(value) for name, value in metrics.items()}


class SACSteps:
    """What SAC learns from, in a sampler's place: steps in the environments, kept in `folder` (see `ReplayLog`)."""

    def __init__(self, learner: SAC, folder: Path) -> None:
        self._trainer, self._log = learner.trainer, ReplayLog(folder)

    def next(self) -> EpisodeEnd | None:
        """Take a step; the episode that it ended, if it did.

        Raises:
            TrainingDivergedError: NaN or Inf in the actor's weights.
        """
        if not self._trainer.steps:
            self._log.take_up(0)  # what a process that was killed before its first checkpoint has left
        with _naming_divergence(self._trainer, self._trainer.steps):
            return self._trainer.step()

    def state(self) -> dict[str, Any]:
        """What has to be known to go on, as JSON; the steps that are new are written first."""
        self._log.append(self._trainer.transitions(self._log.steps), self._trainer.steps)
        return self._trainer.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was called; the learner has its networks and optimisers back already.

        Raises:
            InputError: steps that are missing or damaged, a state that does not fit.
        """
        try:
            self._trainer.load_state(state, self._log.take_up(int(state["counters"][0])))
        except InputError:
            raise
        except (KeyError, IndexError, TypeError, ValueError) as error:
            found = f"{type(error).__name__}: {error}"[:200]
            raise InputError("the recorded steps do not fit", path=self._log.folder, found=found) from None


@contextmanager
def _naming_divergence(trainer: SacTrainer, iteration: int) -> Iterator[None]:
    """stable-baselines3's distributions refuse NaN by a ValueError that says nothing of the training."""
    try:
        yield
    except ValueError as error:
        if all(bool(parameter.isfinite().all()) for parameter in trainer.actor.parameters()):
            raise
        raise TrainingDivergedError(
            f"the actor's weights became NaN or Inf before iteration {iteration + 1}; training stopped.\n"
            "  Try a lower --method.lr."
        ) from error
