"""Settings that can be refused before anything is read, collected or trained."""

from __future__ import annotations

from llmdpd.config.schema import TrainConfig
from llmdpd.data.collecting.scripted import parse_noise
from llmdpd.errors import InputError, located
from llmdpd.methods.decision_transformer.network import check_sequence_policy
from llmdpd.methods.llmdpd.method import check_chunk
from llmdpd.methods.mtdiff.network import check_mtdiff_policy
from llmdpd.methods.networks import ONLINE, POLICY_DIFFUSION, SEQUENCE_MODELS
from llmdpd.methods.trajectory_diffusion.network import check_plan_acting, check_plan_chunk
from llmdpd.tasks.specs import TaskSpec, common_spec
from llmdpd.training.batches import check_batch
from llmdpd.utils.bounds import LIMITS, check_limits


def check_values(config: TrainConfig) -> None:
    """Numbers in range, and fields that fit together.

    Raises:
        InputError: naming the first field that is wrong.
    """
    check_limits(config, LIMITS)
    with located(field="policy"):
        config.policy.check()
    with located(field="data"):
        parse_noise(config.data.noise)
    spec = common_spec((*config.tasks.seen, *config.tasks.unseen))
    check_max_steps(spec, config.evaluation.max_steps)
    augmentation, features = config.training.augmentation, config.policy.context.features
    if (augmentation.turn or augmentation.mirror) and features != "relative" and spec.has_success:
        raise InputError(
            "turned and mirrored scenes need features that don't say how things are turned",
            field="policy.context.features",
            found=features,
            expected="relative, or training.augmentation.turn and training.augmentation.mirror of 0",
        )
    if not spec.has_success and config.training.augmentation.active:
        raise InputError(
            "only Meta-World's geometry can be augmented",
            field="training.augmentation",
            found=f"{config.training.augmentation} for {spec.task}",
            expected="no augmentation in locomotion",
        )
    check_batch(config.training.batch_size, config.training.prompts_per_batch)
    with located(field="acting"):
        config.acting.plan(config.policy)
        config.acting.played(config.policy)
    if config.method == "trajectory-diffusion":
        check_plan_chunk(config.policy)
        _check_plan_augmentation(config)
        check_views(config)
        check_plan_acting(config.acting)
        return
    check_views(config)
    if config.method == "mtdiff":
        check_mtdiff_policy(config.policy)
        check_plan_acting(config.acting)
    if config.method in SEQUENCE_MODELS:
        check_sequence_policy(config.policy, prompted=config.method == "prompt-dt")
    if config.method in ONLINE:
        _check_online(config, spec)
    if config.method in POLICY_DIFFUSION:
        check_chunk(config.policy.chunk, config.agent.eta)
    elif config.policy.chunk != 1:
        raise InputError(
            "only policy diffusion has chunks", field="policy.chunk", found=config.policy.chunk, expected=1
        )
    if config.method == "diffusion-bc" and config.agent.eta:
        raise InputError(
            "diffusion-bc clones alone",
            field="agent.eta",
            found=config.agent.eta,
            expected="0, or --agent diffusion-ql",
        )
    if config.rad.scale_low > config.rad.scale_high:
        raise InputError(
            "the least factor is greater than the greatest",
            field="rad.scale_low",
            found=config.rad.scale_low,
            expected=f"at most {config.rad.scale_high} (rad.scale_high)",
        )
    if config.acting.samples > 1 and not config.trains_critic:
        raise InputError(
            "no critic to choose among samples by",
            field="acting.samples",
            found=config.acting.samples,
            expected="1 where nothing is trained to choose by, as with agent.eta 0",
        )


def check_max_steps(spec: TaskSpec, max_steps: int, field: str = "evaluation.max_steps") -> None:
    """Raise `InputError` where evaluated episodes are to be longer than the environment lets them be."""
    if max_steps > spec.max_steps:
        raise InputError(
            "the number is out of range",
            field=field,
            found=max_steps,
            expected=f"1 to {spec.max_steps}, where {spec.task} ends its episodes",
        )


def _check_online(config: TrainConfig, spec: TaskSpec) -> None:
    """Refuse what an actor of the environment's own cannot have, and a run that would end before it learns."""
    if config.sac.max_steps is not None:
        check_max_steps(spec, config.sac.max_steps, "sac.max_steps")
    if config.policy.action_bound != 1:
        found = config.policy.action_bound
        raise InputError(
            "the environments' actions lie within ±1", field="policy.action_bound", found=found, expected=1
        )
    if config.sac.learning_starts >= config.training.iterations:
        raise InputError(
            "the run ends before the first gradient step",
            field="sac.learning_starts",
            found=config.sac.learning_starts,
            expected=f"below {config.training.iterations} (training.iterations)",
        )


def check_views(config: TrainConfig) -> None:
    """Refuse views of a scene to a policy that never learns from turned ones, or can't look at them.

    Where no example is read nothing is looked at in views, and any number passes.
    """
    views, augmentation, features = config.acting.views, config.training.augmentation, config.policy.context.features
    if views == 1 or not config.policy.context.trajectory:
        return
    for field, found, needed, fits in (
        ("method", config.method, f"one of {', '.join(POLICY_DIFFUSION)}", config.method in POLICY_DIFFUSION),
        ("policy.context.features", features, "relative", features == "relative"),
        ("training.augmentation.mirror", augmentation.mirror, "above 0", augmentation.mirror > 0),
        ("training.augmentation.turn", augmentation.turn, "above 0", augmentation.turn > 0 or views == 2),
    ):
        if not fits:
            raise InputError(
                "turned and mirrored views are for policy diffusion that learns from such scenes",
                field="acting.views",
                found=f"{views}, with {field} {found}",
                expected=f"1, or {field} {needed}",
            )


def _check_plan_augmentation(config: TrainConfig) -> None:
    """Refuse changes that take states out of the data's range, which plans are scaled to and clipped at."""
    augmentation = config.training.augmentation
    for name in ("turn", "mirror", "gripper"):
        if getattr(augmentation, name):
            raise InputError(
                "plans are scaled to the range of the data, which this augmentation leaves",
                field=f"training.augmentation.{name}",
                found=getattr(augmentation, name),
                expected="0 with trajectory diffusion",
                hint="--preset metaworld-trajectory-diffusion has settings that fit",
            )
