"""Presets: configurations by name."""

from __future__ import annotations

from dataclasses import replace

from llmdpd.config.schema import TrainConfig
from llmdpd.data.augmentation import AugmentationConfig
from llmdpd.data.config import DataConfig
from llmdpd.errors import InputError, nearest_names
from llmdpd.evaluation.config import EvaluationConfig
from llmdpd.methods import METHODS
from llmdpd.methods.base import MethodConfig, Start
from llmdpd.methods.llmdpd.method import LLMDPDConfig
from llmdpd.methods.llmdpd.network import DiffusionNetworkConfig
from llmdpd.nn.acting import BestOfN
from llmdpd.nn.context import ContextConfig
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig
from llmdpd.tasks.protocols import PROTOCOLS, TaskConfig
from llmdpd.training.config import TrainingConfig

# Presets whose networks fit two CPU cores.
_SMALL = ("metaworld", "smoke", "tasks", "tasks-plain", "ogbench-scene")

# The paper's algorithm with the sizes of its forerunners: Diffusion-QL's networks, MTDiff's transformer and its window.
_PAPER_METHOD = LLMDPDConfig(
    network=DiffusionNetworkConfig(context=ContextConfig(encoder=TrajectoryEncoderConfig(steps=20, sampling="window")))
)

_PAPER = TrainConfig(
    preset="metaworld-paper",
    method=_PAPER_METHOD,
    training=TrainingConfig(iterations=100_000, checkpoint_every=5000, select_every=10_000),
)

_METAWORLD_METHOD = LLMDPDConfig(
    network=DiffusionNetworkConfig(
        context=ContextConfig(
            "retrieval",
            # With more dropout of texts seeds failed at unseen tasks; with less of demonstrations the text alone
            # fails: docs/research-log.
            text_dropout=0.02,
            trajectory_dropout=0.2,
            features="relative",
            encoder=TrajectoryEncoderConfig(
                layers=1, heads=4, width=128, inner=256, dropout=0.0, steps=32, trim="useful"
            ),
        )
    ),
    acting=BestOfN(samples=1, noise_scale=0.3, contradicted_text="drop", track_after=3.0),
    batch_size=480,
    prompts_per_batch=12,
    # Without it longer training makes the policy worse at tasks that are unlike the training's (docs/research-log).
    self_prompted=0.25,
    augmentation=AugmentationConfig(offset=0.04, rotate=0.5, mirror=0.5),
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
)

# What was tried out on Meta-World alone, and is not measured elsewhere.
_ELSEWHERE = replace(
    _METAWORLD_METHOD,
    network=replace(
        _METAWORLD_METHOD.network,
        context=replace(_METAWORLD_METHOD.network.context_config(), trajectory_dropout=0.07),
    ),
    self_prompted=0.0,
    acting=_METAWORLD_METHOD.acting.heeding_texts(),
)

_METAWORLD = TrainConfig(
    tasks=PROTOCOLS["ml45"],
    # Whoever has a demonstration made it: a policy that has read slow and halting ones in training reads them later.
    data=DataConfig(episodes=50, noise="clean:0.4,gaussian:0.2,bursts:0.1,slow:0.1,pauses:0.1,detour:0.1"),
    method=_METAWORLD_METHOD,
    # No best checkpoint: what few episodes of each task choose is noise, and one was seven points below the last.
    training=TrainingConfig(iterations=9000, checkpoint_every=3000, select_every=0),
    evaluation=EvaluationConfig(episodes=25),
)

_SMOKE = replace(
    _METAWORLD,
    preset="smoke",
    tasks=PROTOCOLS["paper"],
    data=DataConfig(episodes=20, demonstration_episodes=2),
    # With critics, so that every part of the algorithm is run.
    method=replace(_METAWORLD_METHOD, eta=0.05),
    training=TrainingConfig(iterations=200, log_every=20, checkpoint_every=100, select_every=100, select_episodes=2),
    evaluation=EvaluationConfig(episodes=2, max_steps=150),
)

# The default in another world: OGBench's scene, of which one layout says where hand, cube, buttons and handles are.
_OGBENCH = replace(
    _METAWORLD,
    preset="ogbench-scene",
    tasks=PROTOCOLS["ogbench-scene"],
    data=DataConfig(episodes=60, noise="clean:0.5,gaussian:0.25,bursts:0.15,pauses:0.1", post_success_steps=10),
    method=_ELSEWHERE,
    training=TrainingConfig(iterations=6000, checkpoint_every=2000, select_every=0),
)


# Of a user's own tasks (--tasks-file): his data hold what was done, and no expert's opinion beside it.
# With self_prompted the tutorial's eight tasks were learned no better (docs/research-log/own-tasks.md).
_TASKS_METHOD = replace(_ELSEWHERE, clone="executed")

_TASKS = replace(
    _METAWORLD,
    preset="tasks",
    tasks=PROTOCOLS["paper"],
    data=DataConfig(),
    method=_TASKS_METHOD,
    training=TrainingConfig(iterations=8000, checkpoint_every=2000, select_every=4000, select_episodes=10),
)

# Without a layout nothing says how scenes are moved, or which numbers' differences are distances.
_TASKS_PLAIN = replace(
    _TASKS,
    preset="tasks-plain",
    method=replace(
        _TASKS_METHOD,
        network=replace(_TASKS_METHOD.network, context=replace(_TASKS_METHOD.network.context, features="normalised")),
        augmentation=AugmentationConfig(),
    ),
)


def _d4rl(task: str, grad_clip: float) -> TrainConfig:
    """One locomotion task with Diffusion-QL's published settings for medium-replay.

    Fewer iterations than its 2 M and a smaller trajectory encoder: what two CPU cores do in a quarter of an hour.
    """
    encoder = TrajectoryEncoderConfig(layers=2, width=64, inner=256, steps=20)
    network = DiffusionNetworkConfig(context=ContextConfig(encoder=encoder))
    return TrainConfig(
        preset=f"d4rl-{task}",
        tasks=TaskConfig(protocol="d4rl", seen=(task,), unseen=()),
        method=LLMDPDConfig(network=network, grad_clip=grad_clip, lr_final=0.0),
        training=TrainingConfig(iterations=20_000, checkpoint_every=2000, select_every=2000),
        evaluation=EvaluationConfig(episodes=100, max_steps=1000),
    )


def with_method(config: TrainConfig, name: str) -> TrainConfig:
    """A preset's configuration as `--method NAME` starts from it: the same tasks and data, learned by another method.

    Raises:
        InputError: no such method.
    """
    if name == config.method.name:
        return config
    if name not in METHODS:
        raise METHODS.unknown(name, field="--method")
    own = PRESETS[config.preset]
    base = PRESETS[ABLATED.get(own.preset, own.preset)]
    diffusion = own.method if isinstance(own.method, LLMDPDConfig) else base.method
    start = Start(diffusion, base.method, small=base.preset in _SMALL)
    return replace(config, method=METHODS[name].Config.from_preset(start))


def _table3(base: TrainConfig, method: LLMDPDConfig) -> tuple[TrainConfig, ...]:
    """The ablations of the paper's table 3: a base preset with one change each, named after both."""

    def prompted(**prompts: bool) -> MethodConfig:
        context = replace(method.network.context, **prompts)  # type: ignore[arg-type]
        return replace(method, network=replace(method.network, context=context))

    start = Start(method, method, small=base.preset in _SMALL)
    variants = {
        "no-prompts": replace(base, method=prompted(text=False, trajectory=False)),
        "no-text": replace(base, method=prompted(text=False)),
        "no-trajectory": replace(base, method=prompted(trajectory=False)),
        "olmo-1b": replace(base, llm="olmo-1b"),
        "trajectory-diffusion": replace(base, method=METHODS["trajectory-diffusion"].Config.from_preset(start)),
    }
    return tuple(replace(variant, preset=f"{base.preset}-{name}") for name, variant in variants.items())


# Bounds on the gradient norm as Diffusion-QL has them.
_D4RL = (_d4rl("hopper", 4.0), _d4rl("halfcheetah", 2.0), _d4rl("walker2d", 4.0))
_TABLE_3 = {
    _METAWORLD.preset: _table3(_METAWORLD, _METAWORLD_METHOD),
    _PAPER.preset: _table3(_PAPER, _PAPER_METHOD),
}
PRESETS: dict[str, TrainConfig] = {
    config.preset: config
    for config in (
        _METAWORLD,
        _TASKS,
        _TASKS_PLAIN,
        _PAPER,
        _SMOKE,
        _OGBENCH,
        *_D4RL,
        *(variant for group in _TABLE_3.values() for variant in group),
    )
}
ABLATED: dict[str, str] = {variant.preset: base for base, group in _TABLE_3.items() for variant in group}
"""The preset that each of table 3's ablations leaves something out of."""


def find_preset(name: str) -> TrainConfig:
    """The preset of this name.

    Raises:
        InputError: there is none.
    """
    if name not in PRESETS:
        raise InputError(
            "unknown preset",
            field="--preset",
            found=name,
            expected=", ".join(PRESETS),
            hint=f"nearest names: {nearest_names(name, PRESETS)}",
        )
    return PRESETS[name]
