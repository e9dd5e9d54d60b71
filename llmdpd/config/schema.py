"""The configuration of a run: frozen dataclasses, and presets, which are values of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import tyro

from llmdpd.evaluation.config import EvaluationConfig as EvaluationConfig
from llmdpd.methods.acting import ActingConfig
from llmdpd.methods.bc import CloningConfig
from llmdpd.methods.cql import CQLConfig
from llmdpd.methods.decision_transformer.method import DecisionTransformerConfig
from llmdpd.methods.lamo.method import LaMoConfig
from llmdpd.methods.llmdpd.method import LLMDPDConfig
from llmdpd.methods.mtdiff.method import MTDiffConfig
from llmdpd.methods.networks import POLICY_DIFFUSION, Method
from llmdpd.methods.sac import SACConfig
from llmdpd.methods.td3_bc.method import TD3BCConfig
from llmdpd.methods.td3_bc.state_augmentation import RADConfig, S4RLConfig
from llmdpd.methods.trajectory_diffusion.method import TrajectoryDiffusionConfig
from llmdpd.nn.context import ContextConfig
from llmdpd.nn.plan_denoiser import PlanConfig
from llmdpd.nn.policy_network import PolicyConfig
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig
from llmdpd.tasks.protocols import DESIGN_TASKS as DESIGN_TASKS
from llmdpd.tasks.protocols import PROTOCOLS as PROTOCOLS
from llmdpd.tasks.protocols import TaskConfig as TaskConfig
from llmdpd.training.augmentation import AugmentationConfig
from llmdpd.training.cuda_graph import CudaGraphMode


@dataclass(frozen=True)
class DataConfig:
    """Where the trajectories come from."""

    path: Annotated[str | None, tyro.conf.arg(aliases=["--data"])] = None
    """Data set to train on: a Minari folder, HDF5 of D4RL's layout, MTDiff files, minari:ID, d4rl:NAME. By default it
    is collected: in Meta-World by scripted experts, in locomotion by SAC (see llmdpd.collect --policy sac)."""
    prompts: str | None = None
    """Data set of the example trajectories for evaluation; by default collected, by the clean expert, or in locomotion
    the training data, of which the episode of the highest return is taken."""
    root: str = "data"
    """Folder under which collected data is kept, and found again."""
    episodes: int = 200
    """Collected episodes a seen task."""
    prompt_episodes: int = 3
    """Collected example episodes a task, seen and unseen, for evaluation; never trained on."""
    noise: str = "clean:0.5,gaussian:0.3,bursts:0.2"
    """Mixture of behaviours, with their shares: clean, gaussian, bursts, random, slow … (see llmdpd.collect)."""
    tail: int = 20
    """Steps that a collected episode, of the training data or an example, goes on after its first success."""
    seed: int = 0
    """Seed of the collection."""
    keep_failed: bool = False
    """Learn from episodes that failed, too."""
    fraction: float = 1.0
    """Share of each task's episodes that is learned from, at least one of each, drawn by `data.seed`; a smaller
    share is part of a greater one."""
    sac_steps: int = 1_000_000
    """Steps of SAC at most, where it collects; it stops earlier where it reaches the medium level."""
    workers: int | None = None
    """Processes for collection and evaluation; one a core by default."""


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop."""

    iterations: int = 5000
    """Iterations of Algorithm 1, or of the method's own; of sac, steps in the environment."""
    batch_size: int = 256
    """Transitions an iteration."""
    prompts_per_batch: int = 1
    """Prompts in a batch, each of one task and over its own share of the transitions; Algorithm 1 takes 1."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """Random changes of state and example together; Meta-World's layout alone."""
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
class TrainConfig:
    """A whole run: collect, embed prompts, train, evaluate, report."""

    preset: Annotated[str, tyro.conf.Suppress] = "metaworld"
    """Name of the preset that this configuration started from."""
    method: Annotated[Method, tyro.conf.arg(aliases=["--agent"])] = "llmdpd"
    """What learns: `llmdpd` (Algorithm 1); `trajectory-diffusion`, the paper's ablation w/o-DP; or a baseline, which
    starts from the preset with its own settings, without prompts unless it reads an example (docs/baselines.md)."""
    seed: int = 0
    """Seed of networks, batches and noise."""
    device: str = "cpu"
    """cpu, cuda or cuda:N; sac trains on the CPU, and acts on the device."""
    threads: int = 0
    """CPU threads of the C++ kernels, 0 for all cores; results do not depend on it. The rest, in torch, takes one."""
    llm: str = "minilm"
    """Text model: minilm, llama-3-8b, olmo-1b, any Hugging Face hub id, or a local folder."""
    tasks: TaskConfig = field(default_factory=TaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    agent: LLMDPDConfig = field(default_factory=LLMDPDConfig)
    planner: TrajectoryDiffusionConfig = field(default_factory=TrajectoryDiffusionConfig)
    bc: CloningConfig = field(default_factory=CloningConfig)
    td3_bc: TD3BCConfig = field(default_factory=TD3BCConfig)
    rad: RADConfig = field(default_factory=RADConfig)
    s4rl: S4RLConfig = field(default_factory=S4RLConfig)
    cql: CQLConfig = field(default_factory=CQLConfig)
    dt: DecisionTransformerConfig = field(default_factory=DecisionTransformerConfig)
    mtdiff: MTDiffConfig = field(default_factory=MTDiffConfig)
    lamo: LaMoConfig = field(default_factory=LaMoConfig)
    sac: SACConfig = field(default_factory=SACConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    acting: ActingConfig = field(default_factory=ActingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def cloned(self) -> tuple[Literal["executed", "expert"], str]:
        """The actions that the method clones, "executed" or "expert", and the field that says so."""
        if self.method in POLICY_DIFFUSION:
            return self.agent.clone, "agent.clone"
        if self.method == "trajectory-diffusion":
            return self.planner.clone, "planner.clone"
        return (self.bc.clone, "bc.clone") if self.method == "bc" else ("executed", "method")

    @property
    def trains_critic(self) -> bool:
        """Whether there are critics to choose among several actions by."""
        return self.method in POLICY_DIFFUSION and self.agent.eta != 0


_SMALL_ENCODER = TrajectoryEncoderConfig(layers=1, heads=4, width=128, inner=256, dropout=0.0, steps=32)

_SMALL_PLAN = PlanConfig(horizon=8, layers=2, width=128, inner=256)

# The paper's algorithm with the sizes of its forerunners: Diffusion-QL's networks, MTDiff's transformer and its window.
_PAPER = TrainConfig(
    preset="metaworld-paper",
    policy=PolicyConfig(context=ContextConfig(encoder=TrajectoryEncoderConfig(steps=20, sampling="window"))),
    training=TrainingConfig(iterations=100_000, checkpoint_every=5000, select_every=10_000),
)

_METAWORLD = TrainConfig(
    tasks=PROTOCOLS["ml45"],
    # Examples are made by whoever has one: a policy that has read slow and halting ones in training reads them later.
    data=DataConfig(episodes=50, noise="clean:0.4,gaussian:0.2,bursts:0.1,slow:0.1,pauses:0.1,detour:0.1"),
    policy=PolicyConfig(
        context=ContextConfig(
            "retrieval",
            # With more of it seeds failed at unseen tasks, with less the text alone fails: docs/generalisation.md.
            text_dropout=0.02,
            trajectory_dropout=0.07,
            features="relative",
            encoder=_SMALL_ENCODER,
        ),
        plan=_SMALL_PLAN,
    ),
    agent=LLMDPDConfig(
        lr=6e-4,
        lr_warmup=300,
        lr_final=0.03,
        weight_decay=1e-4,
        grad_clip=1.0,
        eta=0.0,
        reward_scale=0.1,
        clone="expert",
        critic_sees_prompts=True,
        ema_decay=0.999,
        ema_every=1,
        precision="bf16",
    ),
    planner=TrajectoryDiffusionConfig(
        lr=6e-4,
        lr_warmup=300,
        lr_final=0.03,
        weight_decay=1e-4,
        grad_clip=1.0,
        clone="expert",
        ema_decay=0.999,
        ema_every=1,
    ),
    training=TrainingConfig(
        iterations=15_000,
        batch_size=480,
        prompts_per_batch=12,
        augmentation=AugmentationConfig(offset=0.04, turn=0.5, mirror=0.5),
        checkpoint_every=2500,
        select_every=5000,
        select_episodes=1,
    ),
    acting=ActingConfig(samples=1, noise_scale=0.3),
    evaluation=EvaluationConfig(episodes=25),
)

_SMOKE = replace(
    _METAWORLD,
    preset="smoke",
    tasks=PROTOCOLS["paper"],
    data=DataConfig(episodes=20, prompt_episodes=2),
    # With critics, so that every part of the algorithm is run.
    agent=replace(_METAWORLD.agent, eta=0.05),
    training=replace(
        _METAWORLD.training, iterations=200, log_every=20, checkpoint_every=100, select_every=100, select_episodes=2
    ),
    evaluation=EvaluationConfig(episodes=2, max_steps=150),
)


def _d4rl(task: str, grad_clip: float) -> TrainConfig:
    """One locomotion task with Diffusion-QL's published settings for medium-replay.

    Fewer iterations than its 2 M and a smaller trajectory encoder: what two CPU cores do in a quarter of an hour.
    """
    encoder = TrajectoryEncoderConfig(layers=2, width=64, inner=256, steps=20)
    return TrainConfig(
        preset=f"d4rl-{task}",
        tasks=TaskConfig(protocol="d4rl", seen=(task,), unseen=()),
        policy=PolicyConfig(context=ContextConfig(encoder=encoder)),
        agent=LLMDPDConfig(grad_clip=grad_clip, lr_final=0.0),
        training=TrainingConfig(iterations=20_000, checkpoint_every=2000, select_every=2000),
        evaluation=EvaluationConfig(episodes=100, max_steps=1000),
    )


# Bounds on the gradient norm as Diffusion-QL has them.
_D4RL = (_d4rl("hopper", 4.0), _d4rl("halfcheetah", 2.0), _d4rl("walker2d", 4.0))


def table3(base: TrainConfig, chain: int, denoising_steps: int) -> tuple[TrainConfig, ...]:
    """The ablations of the paper's table 3: a base preset with one change each, named after both.

    Trajectory diffusion has a chain of its own length, walked in fewer steps when acting, no critics, and learns from
    scenes that are shifted and nothing else.
    """
    policy, context = base.policy, base.policy.context

    def prompted(text: bool, trajectory: bool) -> TrainConfig:
        prompts = replace(context, text=text, trajectory=trajectory)
        return replace(base, policy=replace(policy, context=prompts))

    variants = {
        "no-prompts": prompted(text=False, trajectory=False),
        "no-text": prompted(text=False, trajectory=True),
        "no-trajectory": prompted(text=True, trajectory=False),
        "olmo-1b": replace(base, llm="olmo-1b"),
        "trajectory-diffusion": replace(
            base,
            method="trajectory-diffusion",
            policy=replace(policy, diffusion_steps=chain),
            # Its plans are scaled to the range of the data, which turned scenes and stretched readings leave.
            training=replace(base.training, augmentation=AugmentationConfig(offset=base.training.augmentation.offset)),
            acting=replace(base.acting, samples=1, sampler="ddim", steps=denoising_steps),
        ),
    }
    return tuple(replace(variant, preset=f"{base.preset}-{name}") for name, variant in variants.items())


_TABLE_3 = {
    _METAWORLD.preset: table3(_METAWORLD, chain=20, denoising_steps=5),
    _PAPER.preset: table3(_PAPER, chain=200, denoising_steps=20),  # the chain's length is MTDiff's
}
PRESETS: dict[str, TrainConfig] = {
    config.preset: config
    for config in (_METAWORLD, _PAPER, _SMOKE, *_D4RL, *(variant for group in _TABLE_3.values() for variant in group))
}
ABLATED: dict[str, str] = {variant.preset: base for base, group in _TABLE_3.items() for variant in group}
"""The preset that each of table 3's ablations leaves something out of."""
