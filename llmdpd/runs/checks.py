"""Settings that can be refused before anything is read, collected or trained."""

from __future__ import annotations

from llmdpd.collection import parse_noise
from llmdpd.config import TrainConfig
from llmdpd.errors import InputError, located
from llmdpd.limits import LIMITS, check_limits
from llmdpd.training.batches import check_batch


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
    check_batch(config.training.batch_size, config.training.tasks_per_batch, len(config.tasks.seen))
    with located(field="acting"):
        config.acting.plan(config.policy)
    if config.acting.samples > 1 and not config.agent.eta:
        raise InputError(
            "no critic to choose among samples by",
            field="acting.samples",
            found=config.acting.samples,
            expected="1 where agent.eta is 0: cloning alone trains no critic",
        )
