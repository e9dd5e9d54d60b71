"""Operations: against numbers worked out by hand, and against those that PyTorch counts in the reference."""

from __future__ import annotations

import counting
import pytest
import torch
from counting import Sizes
from torch.utils.flop_counter import FlopCounterMode
from workloads import Training, diffusion_ql, metaworld

from llmdpd.diffusion import NoiseMLP, reverse_diffusion, sampler_coefficients
from llmdpd.nn.critic import DoubleQ

CPU = torch.device("cpu")
SIZES = Sizes(state=7, action=3, prompt=5, hidden=24)
T = 16  # the time embedding, which the counts leave out


def test_numbers_worked_out_by_hand() -> None:
    # A row: 39 · 256 for the state, and five steps of 4 · 256 + 2 · 256² + 256 · 4.
    assert counting.chain_forward(Sizes(prompt=0), 1, 5) == 2 * (9_984 + 5 * 133_120) == 1_351_168
    assert counting.chain_forward(Sizes(), 256, 5) == 256 * 1_351_168 + 2 * 65_536
    assert counting.chain_both(Sizes(), 256, 5) == 3 * counting.chain_forward(Sizes(), 256, 5)
    # Diffusion-QL's iteration. Multiply-adds a row: the target's chain 675,584; two target critics of 142,336; two
    # critics 3 · 142,336 - 11,008; the diffusion loss 3 · 143,104 - 11,008; the chain 3 · 675,584 - 11,008; two
    # critics of 142,336 and one back to the actions, 131,072 + 256 + 4 · 256.
    a_row = 675_584 + 284_672 + 832_000 + 418_304 + 2_015_744 + 284_672 + 132_352
    assert counting.train_step(Sizes(prompt=0), Sizes(prompt=0), 256, 5) == 2 * 256 * a_row
    assert 2.3e9 < 2 * 256 * a_row < 2.6e9


def test_best_of_counts_the_states_columns_once_and_both_critics_at_every_draw() -> None:
    # A draw: five steps, and 4 · 256 + 2 · 256² + 256 in each critic. A state: 39 · 256 in the chain and each critic.
    draw, state = 5 * 133_120 + 2 * 132_352, 3 * 9_984
    assert counting.best_of(Sizes(prompt=0), Sizes(prompt=0), 16, 5, 50) == 2 * 16 * (50 * draw + state)


def counted(run: object) -> int:
    with FlopCounterMode(display=False) as counter:
        run()  # type: ignore[operator]
    return counter.get_total_flops()


def time_rows(rows: int, hidden: int) -> int:
    return 2 * rows * (T * 2 * T + 2 * T * T + T * hidden)


@pytest.mark.parametrize(("B", "K", "N"), [(1, 5, 1), (6, 3, 1), (4, 2, 5)])
def test_chain_is_what_the_reference_multiplies(B: int, K: int, N: int) -> None:
    net = NoiseMLP(SIZES.state, SIZES.action, SIZES.prompt, SIZES.hidden, T)
    state, prompt, plan = torch.randn(B, SIZES.state), torch.randn(SIZES.prompt), sampler_coefficients("ddpm", K)

    def run() -> None:
        with torch.no_grad():
            reverse_diffusion(net, state, prompt, plan, N, backend="reference")

    assert counted(run) - time_rows(K, SIZES.hidden) == counting.chain_forward(SIZES, B, K, N)


def test_critics_are_what_pytorch_multiplies_but_for_the_states_columns() -> None:
    critic = DoubleQ(SIZES.state, SIZES.action, 0, SIZES.hidden).double()
    B, N = 3, 5
    state, action = torch.randn(B, 1, SIZES.state).expand(-1, N, -1).double(), torch.randn(B, N, SIZES.action).double()
    found = counted(lambda: critic(state, action, state[..., :0]))
    again = 2 * B * (N - 1) * SIZES.state * SIZES.hidden
    assert found == 2 * (counting.critic_forward(Sizes(7, 3, 0, 24), B, N) + again)


def test_training_iteration_is_what_the_reference_multiplies(double: None) -> None:
    """Within two per cent, where the smallest product of two hidden layers is three: the reference also multiplies time
    embeddings, and sends gradients to some inputs that need none."""
    B, K = 32, 5
    training = in_double(diffusion_ql(Sizes(), CPU, B, K))
    embeddings = time_rows(K, 256) + 3 * (time_rows(K, 256) + time_rows(B, 256))
    assert counted(training.update) - embeddings == pytest.approx(training.flops, rel=0.02)


def test_the_whole_iteration_is_what_the_reference_multiplies(double: None) -> None:
    """Within a few per cent: the reference multiplies the prompt for every row of the critics, and the encoders'
    attention is not counted alike in all versions of PyTorch."""
    training = in_double(metaworld(Sizes(), CPU))
    B = len(training.batch.rewards)
    prompt, hidden = training.learner.policy.context.prompt_dim, training.learner.critic.hidden_dim
    # Two target critics; two critics forward and for their weights; two critics forward, one back to its input.
    repeated = 2 * B * prompt * hidden * (2 + 2 * 2 + 2 + 1)
    assert counted(training.update) == pytest.approx(training.flops + repeated, rel=0.03)


def in_double(training: Training) -> Training:
    """In float64 everything is PyTorch, whose products are counted, whatever float32 runs on."""
    learner, batch = training.learner, training.batch
    for module in learner.modules.values():
        module.double()
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            object.__setattr__(batch, name, value.double())
    if batch.tokens is not None:
        for name in ("states", "actions", "phase"):
            object.__setattr__(batch.tokens, name, getattr(batch.tokens, name).double())
    return training
