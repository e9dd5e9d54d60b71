"""`Method`: what learns, by which losses, and the configuration and the network that belong to it.

A method has one home: a module or folder of `llmdpd.methods` with its configuration (`Method.Config`), its network
(`Method.build_network`), its losses (`Method.learn`), what it makes of a preset (`MethodConfig.from_preset`) and its
checks. `llmdpd.methods.METHODS` finds it by name.

An iteration is three parts: `schedule` and `follow` decide by the iteration's number, on the host; `learn` is the work
of the device, the same at every iteration, so that a CUDA graph can hold it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmdpd.data import TrajectoryDataset
from llmdpd.data.augmentation import AugmentationConfig
from llmdpd.errors import InputError, located
from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.optimisation import OptimisationConfig, ema_rate, rate_factor
from llmdpd.methods.stacked import Stacked
from llmdpd.nn.acting import ActingConfig
from llmdpd.nn.config import ContextNetworkConfig, NetworkConfig
from llmdpd.nn.context import Condition, ContextConfig, EncodedPrompts
from llmdpd.nn.policy_network import PolicyNetwork
from llmdpd.nn.spaces import Spaces
from llmdpd.ops.parted import average, clipped_step
from llmdpd.ops.resident import keys_on_device
from llmdpd.tasks.specs import TaskSpec
from llmdpd.utils import sharding
from llmdpd.utils.bounds import Count, Fraction
from llmdpd.utils.plain import Named
from llmdpd.utils.tensors import load_tensors

Network = TypeVar("Network", bound=PolicyNetwork)
Config = TypeVar("Config", bound="OfflineConfig")
Module = TypeVar("Module", bound=nn.Module)
Clone = Literal["executed", "expert"]


@dataclass(frozen=True)
class Start:
    """What a preset gives to whichever method starts from it.

    diffusion: its configuration of policy diffusion, an `LLMDPDConfig`. whole: the same of the preset that it leaves
    something out of; else as `diffusion`. small: whether its networks fit two CPU cores.
    """

    diffusion: Any
    whole: Any
    small: bool = False

    @property
    def promptless(self) -> ContextConfig:
        """The preset's context without prompts."""
        context: ContextConfig = self.diffusion.network.context
        return replace(context, text=False, trajectory=False, text_dropout=0.0, trajectory_dropout=0.0)

    @property
    def batches(self) -> dict[str, Any]:
        """The preset's batches."""
        return {name: getattr(self.diffusion, name) for name in ("batch_size", "prompts_per_batch")}


@dataclass(frozen=True)
class MethodConfig(Named):
    """The configuration of a method: its network, how its policy acts, and how it learns."""

    legacy: ClassVar[Mapping[str, str]] = {}
    """Version 0.1's sections that were the method's own, and where they are now."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    """The policy's network."""
    acting: ActingConfig = field(default_factory=ActingConfig)
    """How the trained policy acts."""
    batch_size: Count = 256
    """Transitions an iteration."""

    @classmethod
    def by_name(cls, name: str) -> type[Named]:
        from llmdpd.methods import METHODS

        if name not in METHODS:
            raise METHODS.unknown(name, field="")  # the reader knows where it stands
        return METHODS[name].Config

    @classmethod
    def from_preset(cls, start: Start) -> MethodConfig:
        """The configuration with which the method starts from a preset; by default its own defaults."""
        return cls()

    @property
    def cloned(self) -> Clone:
        """The actions that are cloned: the executed ones, or the expert's in the visited states."""
        return "executed"

    action_use: ClassVar[str] = "clones"
    """What the method does with those actions, in the description of its data."""

    def use_of(self, dataset: TrajectoryDataset) -> str:
        """What it does with the actions of a data set, in words.

        Raises:
            InputError: the data lack the expert's actions, which are to be cloned.
        """
        if self.cloned == "expert" and dataset.expert_actions is None:
            raise InputError(
                "the data has no expert actions to clone",
                path=dataset.source,
                field="method.clone",
                found="expert",
                expected="executed",
                hint="use --method.clone executed",
            )
        return f"{self.action_use} the {self.cloned} actions"

    @property
    def choosing_critic(self) -> bool:
        """Whether critics are trained that can choose among several samples."""
        return False

    def check(self) -> None:
        """Raise `InputError` for fields that do not fit each other."""
        with located(field="acting"):
            self.acting.check_network(self.network)

    def check_for(self, spec: TaskSpec, iterations: int) -> None:
        """As `check_run`, naming fields as a run's configuration does."""
        with located(field="method"):
            self.check_run(spec, iterations)

    def check_run(self, spec: TaskSpec, iterations: int) -> None:
        """Raise `InputError` for what does not fit the tasks, which are alike, or the length of the run."""

    def resolved(self) -> MethodConfig:
        """The configuration with what depends on this machine made explicit, such as absolute paths."""
        return self

    def require(self) -> None:
        """Raise `InputError` for a package or a file that the method needs and that is not here."""

    def describe_online(self, iterations: int) -> str:
        """What a method that learns online has in place of a data set, in words."""
        raise NotImplementedError

    def details(self) -> dict[str, str]:
        """What a page about its runs shows beside what all methods have, name → words."""
        return {}

    def shortened(self, iterations: int) -> tuple[str, ...]:
        """Options of `llmdpd train` with which it still learns something in a run of so few iterations."""
        return ()

    def inputs(self) -> dict[str, Any]:
        """What it learns from beside the training data, as JSON: a resumed run must find the same."""
        return {}


@dataclass(frozen=True)
class OfflineConfig(OptimisationConfig, MethodConfig):
    """What methods have that learn from a data set."""

    prompts_per_batch: Count = 1
    """Prompts in a batch, each of one task and over its own share of the transitions; Algorithm 1 takes 1."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """Random changes of states and demonstration together, where the layout of the observations is known."""
    self_prompted: Fraction = 0.0
    """Probability that a prompt's transitions are of the very episode that is its demonstration. There, the best answer
    is what was shown at the same moment (of the expert's actions that are cloned, as far as these were executed): the
    policy learns to do what it is shown, also in tasks that it does not know. Of the other prompts it learns what to
    change where the scene is another one."""

    def check(self) -> None:
        super().check()
        if self.batch_size % self.prompts_per_batch:
            raise InputError(
                "the batch cannot be shared out evenly",
                field="batch_size",
                found=self.batch_size,
                expected=f"a multiple of {self.prompts_per_batch} (prompts_per_batch)",
                hint=f"for example {max(round(self.batch_size / self.prompts_per_batch), 1) * self.prompts_per_batch}",
            )
        # A network whose context can be switched off keeps its preset's augmentation, which then changes nothing.
        reads = isinstance(self.network, ContextNetworkConfig) or self.network.context_config().trajectory
        if self.augmentation.active and not reads:
            raise InputError(
                "only what is learned under a demonstration is augmented, and this method reads none",
                field="augmentation",
                found=self.augmentation,
                expected="no augmentation",
            )
        if self.self_prompted and not reads:
            raise InputError(
                "only a method that reads demonstrations can be prompted by the episode that it learns from",
                field="self_prompted",
                found=self.self_prompted,
                expected=0,
            )

    def check_run(self, spec: TaskSpec, iterations: int) -> None:
        augmentation, features = self.augmentation, self.network.context_config().features
        if augmentation.active and spec.layout is None:
            raise InputError(
                "only observations whose layout is known can be augmented",
                field="augmentation",
                found=f"{augmentation} for {spec.task}",
                expected="no augmentation",
            )
        turned = augmentation.rotate or augmentation.mirror
        if turned and spec.layout is not None and not spec.layout.rotatable:
            raise InputError(
                "rotated and mirrored scenes need a layout that says what is up and how actions move the body",
                field="augmentation",
                found=f"{augmentation} for {spec.task}",
                expected="augmentation.rotate and augmentation.mirror of 0",
            )
        if turned and features != "relative":
            raise InputError(
                "rotated and mirrored scenes need features that are independent of orientation",
                field="network.context.features" if hasattr(self.network, "context") else "network.features",
                found=features,
                expected="relative, or augmentation.rotate and augmentation.mirror of 0",
            )
        tracked = self.acting.takes_over and self.network.context_config().trajectory
        if tracked and not (spec.layout and spec.layout.trackable):
            raise InputError(
                "only demonstrations of tasks whose layout has a goal and action.move can be tracked",
                field="acting.track_after",
                found=f"{self.acting.takes_over:g} for {spec.task}",
                expected="0",
            )


@dataclass(frozen=True)
class UnaveragedConfig(OfflineConfig):
    """Methods whose policy acts as it is: there is no average of it."""

    ema_decay: Fraction = 0.0
    """Decay of the EMA of the policy, which acts; 0: the policy itself."""
    ema_every: Count = 1
    """Iterations from one EMA update to the next."""


@dataclass(frozen=True)
class CloningConfig(OfflineConfig):
    """Methods that can clone the expert in the visited states."""

    clone: Clone = "executed"
    """What is cloned: the executed actions (the paper), or the expert's clean ones in the visited states."""

    @property
    def cloned(self) -> Clone:
        return self.clone


class Learner(ABC):
    """What the training loop trains, and what a checkpoint holds of it."""

    Config: ClassVar[type[MethodConfig]]
    network_class: ClassVar[type[PolicyNetwork]]
    """The policy's network."""
    online: ClassVar[bool] = False
    """Whether it learns in the environments themselves, from no data set."""
    same_work: ClassVar[bool] = False
    """Whether `learn` does the same at every iteration, so that a CUDA graph can hold it."""
    unshared: ClassVar[str] = ""
    """Why several processes can't share its batches; empty where they can."""

    @property
    @abstractmethod
    def modules(self) -> Mapping[str, nn.Module]:
        """Every network by name: with the optimisers, the schema of a checkpoint."""

    @property
    @abstractmethod
    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        """Every optimiser by name."""

    @property
    @abstractmethod
    def acting_network(self) -> PolicyNetwork:
        """The network that acts, as it is now."""

    @property
    def acting_critic(self) -> nn.Module | None:
        """The critics that choose among several samples; None where there are none."""
        return None

    @classmethod
    def build_network(cls, spaces: Spaces, config: Any) -> Any:
        """A `network_class` for these spaces, by a configuration as `Config.network`."""
        return cls.network_class(spaces, config)

    @classmethod
    def in_environments(
        cls, network: Any, config: Any, specs: Sequence[TaskSpec], *, folder: Path, **options: Any
    ) -> tuple[Learner, Any]:
        """A method that learns online, and what it learns from: steps in the environments, kept in `folder`.

        Options: steps (of the whole run), seed, goal_visible.
        """
        raise NotImplementedError

    @classmethod
    def stacked(cls, learners: Sequence[Any]) -> Stacked | None:
        """What does the iterations of these learners at once, which differ by their seed; None: they take turns.

        Each one's is that of `update`. They stay whole: what they have is written in place.
        """
        return None

    def visited_states(self) -> NDArray[np.float32]:
        """The states [N, S] that a method which learns online has been in."""
        raise NotImplementedError

    @abstractmethod
    def update(self, batch: Any, iteration: int) -> dict[str, Tensor]:
        """One iteration, counted from 0. Returns metrics, scalar tensors on the device."""


class Method(Learner, Generic[Network, Config]):
    """A method that learns from a data set; one file says by which losses (`learn`).

    Args:
        network: the policy's.
        config: the method's options.
        iterations: length of the run, for the learning-rate schedule.
    """

    same_work = True

    def __init__(self, network: Network, config: Config, iterations: int) -> None:
        self.config, self.iterations, self.policy = config, iterations, network
        self.ema_policy = self._copy(network).eval().requires_grad_(False)
        self._modules: dict[str, nn.Module] = {"policy": network, "ema_policy": self.ema_policy}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._rates: dict[str, float] = {}
        # Kept: walking through the modules costs the host a tenth of an iteration.
        self._parameters: dict[str, list[nn.Parameter]] = {}
        self._averages: dict[str, dict[str, Any]] = {}
        self._first_share = 0.0
        self._optimise_policy()

    @property
    def modules(self) -> dict[str, nn.Module]:
        return self._modules

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return self._optimizers

    @property
    def acting_network(self) -> Network:
        if not self._first_share:
            return self.ema_policy
        acting = self._copy(self.ema_policy)
        with torch.no_grad():
            for own, first in zip(acting.parameters(), self.modules["first_policy"].parameters(), strict=True):
                own.lerp_(first, self._first_share)
        return acting

    def average_with_first(self, share: float) -> None:
        """Let the mean of the policy's present weights, of this share, and of those that it will have learned act."""
        self._first_share = share
        self.modules["first_policy"] = self._copy(self.policy).eval().requires_grad_(False)

    def update(self, batch: PromptedBatch, iteration: int) -> dict[str, Tensor]:
        self.schedule(iteration)
        with keys_on_device():  # as in a captured graph, so that a run with graphs is the run without them
            metrics = self.learn(batch)
        self.follow(iteration)
        return metrics

    def schedule(self, iteration: int) -> None:
        """Write the learning rates of the iteration where the optimisers read them."""
        factor = rate_factor(self.config, iteration, self.iterations)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:  # in place: a captured graph reads these tensors
                group["lr"].fill_(self._rates[name] * factor)

    @abstractmethod
    def learn(self, batch: PromptedBatch) -> dict[str, Tensor]:
        """Every loss and gradient step: the work of the device."""

    def follow(self, iteration: int) -> None:
        """The EMA's step after the iteration, at its marks: a copy before `ema_start`, then an average."""
        rate = ema_rate(self.config, iteration)
        if rate is not None:
            self._lerp("ema_policy", "policy", rate)

    def take_over(self, critic: nn.Module | None, networks: Mapping[str, Tensor], path: Path) -> list[str]:
        """Take the networks beside the policy's that an earlier training has learned.

        Args:
            critic: that of its policy folder, None where it has none.
            networks: those of its checkpoint, as `modules` names them and their tensors; empty where there is none.
            path: where these are from.

        Returns:
            Names of the networks that were not there, and start anew.

        Raises:
            InputError: networks of other sizes.
        """
        anew = []
        for name, module in self.modules.items():
            if name.endswith("policy"):  # the policy itself, its average and its target
                continue
            prefix = f"{name}/"
            part = {key.removeprefix(prefix): tensor for key, tensor in networks.items() if key.startswith(prefix)}
            if part:
                load_tensors(module, part, path)
            else:
                anew.append(name)
        return anew

    def encode(self, batch: PromptedBatch, network: Network | None = None) -> EncodedPrompts:
        """One pass of the encoders of `network` (by default the policy) over the batch's prompts.

        In training every pass has its own dropout mask, so that one pass serves all losses of a gradient step.
        """
        with sharding.by_prompt():
            return (network or self.policy).encode(batch.text, batch.tokens, batch.keep)

    def condition(
        self, batch: PromptedBatch, prompts: EncodedPrompts, following: bool = False, network: Network | None = None
    ) -> Condition:
        """The batch's states, or the next ones, under prompts that `network` (by default the policy) has encoded."""
        states = batch.next_observations if following else batch.observations
        return (network or self.policy).condition(states, prompts, None, batch.timesteps + following)

    def step(self, name: str | Sequence[str], loss: Tensor) -> Tensor:
        """One step of an optimiser, or of several, down a loss; the norm of their gradient before it is cut.

        Where processes share the batch, the loss is of the own rows, and the step goes down the mean of all losses.
        """
        names = (name,) if isinstance(name, str) else name
        optimizers = [self.optimizers[f"{name}_optimizer"] for name in names]
        for optimizer in optimizers:
            for group in optimizer.param_groups:  # as `zero_grad`, whose bookkeeping takes longer than an encoder
                for parameter in group["params"]:
                    parameter.grad = None
        sharding.backward(loss)
        return clipped_step(optimizers, self.config.grad_clip)

    def track(self, name: str, rate: float) -> None:
        """target ← target + rate (network - target), of the network `name`."""
        self._lerp(f"target_{name}", name, rate)

    @contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        """While the block runs, the network `name` has no gradient."""
        parameters = [parameter for parameter in self._of(name) if parameter.requires_grad]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    def _copy(self, network: Network) -> Network:
        """The network that the EMA is kept in."""
        return copy.deepcopy(network)

    def _optimise_policy(self) -> None:
        """Make the policy's optimiser."""
        learned = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        self._optimise("policy", learned, self.config.lr, self.config.weight_decay)

    def _optimise(self, name: str, parameters: list[nn.Parameter], rate: float, decay: float = 0.0) -> None:
        """Make the optimiser of these parameters, which follows the schedule of rates."""
        device, name = parameters[0].device, f"{name}_optimizer"
        self._rates[name], self._parameters[name] = rate, parameters
        # The rate is a tensor, so that a schedule can change it under a captured graph. The CPU's fused Adam reads
        # any float (in float64 the same bits as a Python float), CUDA's reads float32.
        cuda = device.type == "cuda"
        lr = torch.tensor(rate, dtype=torch.float32 if device.type != "cpu" else torch.float64, device=device)
        self.optimizers[name] = torch.optim.AdamW(parameters, lr, weight_decay=decay, fused=True, capturable=cuda)

    def _add(self, name: str, module: Module, rate: float) -> Module:
        """Add a further network that learns, and return its target."""
        self.modules[name] = module
        target = self._add_target(name, module)
        self._optimise(name, list(module.parameters()), rate)
        return target

    def _add_target(self, name: str, module: Module) -> Module:
        """Add and return `target_NAME`, a copy of the network that `track` moves after it."""
        target = self.modules[f"target_{name}"] = copy.deepcopy(module).eval().requires_grad_(False)
        return target

    def _of(self, name: str) -> list[nn.Parameter]:
        if name not in self._parameters:
            self._parameters[name] = list(self.modules[name].parameters())
        return self._parameters[name]

    @torch.no_grad()
    def _lerp(self, target: str, source: str, rate: float) -> None:
        """target ← target + rate (source - target), in place."""
        average(self._of(target), self._of(source), rate, self._averages.setdefault(f"{target} {source}", {}))
