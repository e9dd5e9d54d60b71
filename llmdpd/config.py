"""The configuration of a run: frozen dataclasses, and presets, which are values of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro

from llmdpd.acting import ActingConfig
from llmdpd.agents.llmdpd import LLMDPDConfig
from llmdpd.context import ContextConfig
from llmdpd.policy_network import PolicyConfig
from llmdpd.prompts.trajectory import TrajectoryEncoderConfig
from llmdpd.training.cuda_graph import CudaGraphMode


@dataclass(frozen=True)
class TaskConfig:
    """Which tasks are learned and which are only evaluated."""

    protocol: str = "paper"
    """Name of this split in results; `paper` and `ml45` become `custom` there where the tasks are not theirs."""
    seen: tuple[str, ...] = ("sweep-into-v3", "coffee-push-v3", "disassemble-v3")
    """Meta-World tasks that are trained on."""
    unseen: tuple[str, ...] = ("box-close-v3", "hand-insert-v3", "bin-picking-v3")
    """Meta-World tasks that are evaluated zero-shot: a text and one example, no training."""
    goal_visible: bool = True
    """Whether observations show the goal (obs[36:39]), in data and evaluation."""


@dataclass(frozen=True)
class DataConfig:
    """Where the trajectories come from."""

    path: str | None = None
    """Data set to train on (a Minari folder, HDF5, MTDiff files, minari:ID); by default scripted experts are driven."""
    prompts: str | None = None
    """Data set of the example trajectories for evaluation; by default collected, by the clean expert."""
    root: str = "data"
    """Folder under which collected data is kept, and found again."""
    episodes: int = 200
    """Collected episodes a seen task."""
    prompt_episodes: int = 3
    """Collected example episodes a task, seen and unseen, for evaluation; never trained on."""
    noise: str = "clean:0.5,gaussian:0.3,bursts:0.2"
    """Mixture of the collecting policy: clean, gaussian, bursts, random, with their shares (see llmdpd.collect)."""
    seed: int = 0
    """Seed of the collection."""
    keep_failed: bool = False
    """Learn from episodes that failed, too."""
    workers: int | None = None
    """Processes for collection and evaluation; one a core by default."""


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop."""

    iterations: int = 5000
    """Iterations of Algorithm 1."""
    batch_size: int = 256
    """Transitions an iteration."""
    tasks_per_batch: int = 1
    """Tasks whose transitions share a batch, each under its own prompts; Algorithm 1 takes 1."""
    log_every: int = 50
    """Iterations from one metrics record to the next; losses are checked for NaN and Inf there."""
    checkpoint_every: int = 1000
    """Iterations from one checkpoint to the next."""
    select_every: int = 1000
    """Iterations from one evaluation on the seen tasks to the next; the best becomes `policy_best`. 0: never."""
    select_episodes: int = 10
    """Episodes a seen task in those evaluations, on seeds apart from the reported ones."""
    cuda_graph: Annotated[CudaGraphMode, tyro.conf.arg(aliases=["--cuda-graph"])] = "auto"
    """Replay iterations from CUDA graphs: `auto` on a GPU where it can be; `on`, and an error where it can't; `off`."""


@dataclass(frozen=True)
class EvaluationConfig:
    """The evaluation at the end of a run."""

    episodes: int = 50
    """Episodes a task, for the last and for the best checkpoint each."""
    max_steps: int = 500
    """Steps an episode at most; success at any of them counts."""
    films: bool = True
    """Film one episode a task where an off-screen renderer exists."""


@dataclass(frozen=True)
class TrainConfig:
    """A whole run: collect, embed prompts, train, evaluate, report."""

    preset: Annotated[str, tyro.conf.Suppress] = "metaworld"
    """Name of the preset that this configuration started from."""
    seed: int = 0
    """Seed of networks, batches and noise."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    threads: int = 0
    """CPU threads of the C++ kernels, 0 for all cores; results do not depend on it. The rest, in torch, takes one."""
    llm: str = "minilm"
    """Text model: minilm, llama-3-8b, olmo-1b, any Hugging Face hub id, or a local folder."""
    tasks: TaskConfig = field(default_factory=TaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    agent: LLMDPDConfig = field(default_factory=LLMDPDConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    acting: ActingConfig = field(default_factory=ActingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


_SMALL_ENCODER = TrajectoryEncoderConfig(layers=2, width=128, inner=512, steps=25)

# The paper's algorithm with the sizes of its forerunners: Diffusion-QL's networks, MTDiff's transformer and its window.
_PAPER = TrainConfig(
    preset="metaworld-paper",
    policy=PolicyConfig(context=ContextConfig(encoder=TrajectoryEncoderConfig(steps=20, sampling="window"))),
    training=TrainingConfig(iterations=100_000, checkpoint_every=5000, select_every=10_000),
)

_METAWORLD = TrainConfig(
    policy=PolicyConfig(context=ContextConfig(features="metaworld", encoder=_SMALL_ENCODER)),
    agent=LLMDPDConfig(
        lr=6e-4,
        lr_warmup=100,
        lr_final=0.03,
        grad_clip=1.0,
        eta=0.05,
        reward_scale=0.1,
        clone="expert",
        critic_sees_prompts=True,
    ),
    acting=ActingConfig(samples=1),
)

_SMOKE = replace(
    _METAWORLD,
    preset="smoke",
    data=DataConfig(episodes=20, prompt_episodes=2),
    training=TrainingConfig(iterations=200, log_every=20, checkpoint_every=100, select_every=100, select_episodes=2),
    evaluation=EvaluationConfig(episodes=2, max_steps=150),
)

PRESETS: dict[str, TrainConfig] = {config.preset: config for config in (_METAWORLD, _PAPER, _SMOKE)}
