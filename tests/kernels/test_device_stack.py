"""Learners stacked on the kernels' device: what each would learn alone by PyTorch, and the same bits at any number."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.llmdpd.device_stack import DeviceStack, _Iteration, of_one_form
from llmdpd.methods.llmdpd.method import LLMDPD, LLMDPDConfig, as_defined
from llmdpd.methods.llmdpd.network import DiffusionNetworkConfig, DiffusionPolicy
from llmdpd.nn.context import ContextConfig
from llmdpd.nn.spaces import Spaces

S, A = 7, 3


def make(device: torch.device, network: Mapping[str, int] | None = None, **changes: Any) -> LLMDPD:
    sizes = {"hidden_dim": 40, **(network or {})}
    config = DiffusionNetworkConfig(context=ContextConfig(text=False, trajectory=False), **sizes)
    policy = DiffusionPolicy(Spaces(S, A, 0), config).to(device)
    learner = LLMDPD(policy, LLMDPDConfig(critic_hidden=33, lr_warmup=2, **changes), 10)
    for optimizer in learner.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = group["lr"].float()  # as on a CUDA device
    return learner


def make_batch(device: torch.device, rows: int, *leading: int) -> PromptedBatch:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*leading, rows, *shape, device=device)

    return PromptedBatch(
        observations=draw(S), actions=draw(A).tanh(), expert_actions=None, rewards=draw(), next_observations=draw(S),
        terminals=(draw() > 1).float(), timesteps=draw().long(), text=None, tokens=None,
    )  # fmt: skip


def of_learner(batch: PromptedBatch, number: int) -> PromptedBatch:
    return batch.with_tensors({name: tensor[number] for name, tensor in batch.tensors().items()})


def of_last(batch: PromptedBatch) -> PromptedBatch:
    return batch.with_tensors({name: tensor[-1:] for name, tensor in batch.tensors().items()})


def generators(device: torch.device, seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def train(
    stack: DeviceStack, batches: Sequence[PromptedBatch], by: Sequence[torch.Generator]
) -> list[dict[str, Tensor]]:
    found = []
    for iteration, batch in enumerate(batches):
        stack.schedule(iteration)
        found.append(stack.learn(batch, by))
        stack.follow(iteration)
    return found


def state_of(learner: LLMDPD) -> dict[str, Tensor]:
    found = {f"{n}/{key}": t for n, module in learner.modules.items() for key, t in module.state_dict().items()}
    for name, optimizer in learner.optimizers.items():
        for number, fields in optimizer.state_dict()["state"].items():
            found |= {f"{name}/{number}/{key}": value for key, value in fields.items()}
    return {key: value.clone() for key, value in found.items()}


@pytest.mark.parametrize(
    ("count", "changes"), [(1, {"precision": "bf16"}), (2, {"grad_clip": 0.5, "weight_decay": 0.01, "eta": 0.3})]
)
def test_it_learns_what_each_learns_alone(
    device: torch.device, close: Callable[..., None], count: int, changes: dict[str, Any]
) -> None:
    learners = [make(device, **changes) for _ in range(count)]
    others, singles = copy.deepcopy(learners), copy.deepcopy(learners)
    assert of_one_form(learners)
    batches = [make_batch(device, 20, count) for _ in range(2)]  # of few rows a gradient may cancel
    metrics = train(DeviceStack(learners), batches, generators(device, range(count)))
    tolerance = 5e-2 if changes.get("precision") == "bf16" else 2e-3
    for number, other in enumerate(others):
        torch.manual_seed(number)
        other.choose_on_host = True
        for iteration, batch in enumerate(batches):
            wanted = other.update(of_learner(batch, number), iteration)
            assert list(wanted) == list(metrics[iteration])
            for name, value in wanted.items():
                close(metrics[iteration][name][number], value.double(), tolerance, name)
        found, expected = state_of(learners[number]), state_of(other)
        assert list(found) == list(expected)
        for name, value in expected.items():
            close(found[name], value.double(), tolerance, name)
    # However many there are beside it, which here are few enough for the same tiles.
    last = count - 1
    train(DeviceStack(singles[last:]), [of_last(batch) for batch in batches], generators(device, [last]))
    for name, value in state_of(learners[last]).items():
        assert torch.equal(state_of(singles[last])[name], value), name


def test_a_loaded_state_and_other_stacks_are_seen(device: torch.device) -> None:
    """What a stack holds is the learners' own, until somebody puts other tensors in its place."""
    first, second = make(device), make(device)
    alone = DeviceStack([first])
    alone._placed()
    assert alone.in_place
    both = DeviceStack([first, second])
    memory = both._placed()
    assert both.in_place
    assert not alone.in_place
    memory.critics.weights.flat.fill_(2.0)
    memory.policy.step()
    assert all((parameter == 2).all() for parameter in second.critic.parameters())
    optimizer = first.optimizers["policy_optimizer"]
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}
    for change in (
        lambda: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
        lambda: optimizer.param_groups[0].update(lr=torch.ones(())),
        lambda: setattr(next(first.critic.parameters()), "data", torch.zeros(33, S + A)),
        lambda: setattr(next(second.ema_policy.parameters()), "data", next(first.ema_policy.parameters()).data.clone()),
    ):
        change()
        assert not both.in_place
        assert both._placed() is not memory
        memory = both._placed()
        assert both.in_place
    next(first.policy.parameters()).requires_grad_(False)
    assert not both.in_place


def test_a_stack_that_was_made_before_a_checkpoint_was_loaded_goes_on_from_it(device: torch.device) -> None:
    """As runs of several seeds do: how they train is said before the checkpoints are read."""
    learner, other = make(device), make(device)
    batch, by = make_batch(device, 3, 1), generators(device, [4])
    train(DeviceStack([learner]), [batch], by)
    stack = DeviceStack([other])
    assert not stack.in_place
    for name, module in learner.modules.items():
        other.modules[name].load_state_dict(module.state_dict())
    for name, optimizer in learner.optimizers.items():
        other.optimizers[name].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(torch.equal(state_of(other)[name], value) for name, value in state_of(learner).items())
    stack.learn(batch, generators(device, [5]))
    assert {float(s["step"]) for o in other.optimizers.values() for s in o.state.values()} == {2.0}


def test_batches_of_any_strides_and_flags(device: torch.device) -> None:
    learner, other = make(device), make(device)
    other.policy.load_state_dict(learner.policy.state_dict())
    batch = make_batch(device, 4, 1)
    wide = torch.randn(1, 4, 3, device=device)
    wide[:, :, 1] = batch.rewards
    odd = batch.with_tensors(batch.tensors() | {"rewards": wide[:, :, 1], "terminals": batch.terminals.bool()})
    plain, strided = (
        _Iteration(DeviceStack([one])._placed(), of, [None]) for one, of in ((learner, batch), (other, odd))
    )
    for name in ("rewards", "terminals", "state", "following", "clean"):
        one, another = getattr(plain, name), getattr(strided, name)
        assert torch.equal(one, another)
        assert another.is_contiguous()
        assert another.dtype is torch.float32


def test_other_forms_are_refused(device: torch.device) -> None:
    first, second = make(device), make(device)
    assert of_one_form([first, second])
    second.policy.context.features.std.fill_(2.0)
    assert not of_one_form([second]), "its average sees other features"
    second.ema_policy.context.features.std.fill_(2.0)
    assert of_one_form([second])
    assert not of_one_form([first, second])
    handle = first.critic.register_forward_hook(lambda *_: None)
    assert not of_one_form([first])
    handle.remove()
    assert of_one_form([first])
    next(first.policy.parameters()).requires_grad_(False)
    assert not of_one_form([first])
    parameters, others = [*second.policy.parameters()], dict(second.optimizers)
    for optimizer in (torch.optim.Adam(parameters), torch.optim.AdamW(parameters[1:])):
        second.optimizers["policy_optimizer"] = optimizer
        assert not of_one_form([second])
    second.optimizers.update(others)
    assert of_one_form([second])
    assert not of_one_form([make(device, batch_size=2048)])
    for changes in ({"time_dim": 34}, {"diffusion_steps": 17}, {"hidden_dim": 2}):
        assert not of_one_form([make(device, network=changes)])


def test_a_method_of_its_own_is_not_stacked(device: torch.device) -> None:
    learner = make(device)
    assert as_defined(learner)
    learner.track = lambda *_: None  # type: ignore[method-assign]
    assert not as_defined(learner)
    assert copy.deepcopy(DeviceStack([learner])) is None
