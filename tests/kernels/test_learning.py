"""The small kernels of several learners' iteration against PyTorch in float64: losses, steps, the time embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Close = Callable[..., None]


def on(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device)


@pytest.mark.parametrize(("learners", "rows", "actions"), [(1, 1, 1), (3, 5, 3), (2, 1200, 2)])
def test_losses(device: torch.device, close: Close, learners: int, rows: int, actions: int) -> None:
    from llmdpd.kernels import losses

    values, following = on(device, 2 * learners, rows, 1), on(device, 2 * learners, rows, 1)
    rewards, terminals = on(device, learners, rows), (on(device, learners, rows) > 0).float()
    launch, d_values, metrics = losses.regression(values, following, rewards, terminals, 0.5, 0.9)
    launch.run()
    exact = values.cpu().double().view(learners, 2, rows).requires_grad_()
    target = 0.5 * rewards.cpu().double()
    target += 0.9 * (1 - terminals.cpu().double()) * following.cpu().double().view(learners, 2, rows).amin(1)
    loss = (exact - target[:, None]).square().mean(2).sum(1)
    close(d_values.view(learners, 2, rows), torch.autograd.grad(loss.sum(), exact)[0], 1e-6)
    close(metrics, torch.stack([loss, exact[:, 0].mean(1), target.mean(1)], 1).detach(), 1e-6)

    predicted, noise = on(device, learners, rows, actions), on(device, learners, rows, actions)
    uniform = torch.linspace(0.1, 0.9, learners, device=device)
    launch, d_predicted, d_values, metrics = losses.actor(predicted, noise, values, uniform, 0.7)
    launch.run()
    exact_predicted = predicted.cpu().double().requires_grad_()
    diffusion = (exact_predicted - noise.cpu().double()).square().mean((1, 2))
    chosen = [0 if number < 0.5 else 1 for number in uniform.tolist()]
    objective = torch.stack([exact[n, c].mean() for n, c in enumerate(chosen)])
    scale = torch.stack([exact[n, 1 - c].abs().mean() for n, c in enumerate(chosen)]).detach()
    loss = diffusion - 0.7 / scale * objective
    by_predicted, by_values = torch.autograd.grad(loss.sum(), [exact_predicted, exact])
    close(d_predicted, by_predicted, 1e-6)
    close(d_values.view(learners, 2, rows), by_values, 1e-6)
    close(metrics, torch.stack([loss, diffusion, objective], 1).detach(), 1e-6)


def test_what_is_not_a_number_stays_one(device: torch.device) -> None:
    from llmdpd.kernels import losses, updates

    one = torch.ones(2, 4, 1, device=device)
    for place in range(2):
        following = one.clone()
        following[place, 1] = float("nan")
        launch, d_values, metrics = losses.regression(one, following, one[:1, :, 0], 0 * one[:1, :, 0], 1.0, 0.9)
        launch.run()
        assert d_values.isnan().sum() == 2
        assert metrics.isnan().any()
    weights, gradient = torch.ones(1, 40, device=device), torch.full((1, 40), float("nan"), device=device)
    moments, count, lr = (0 * weights, 0 * weights), torch.ones(1, 1, device=device), torch.ones(1, device=device)
    norms = updates.step(weights, gradient, moments, count, lr, updates.AdamW((0.9, 0.999), 1e-8, 0.0, 1.0)).run()
    assert norms.isnan().all()
    assert weights.isnan().all()


@pytest.mark.parametrize(
    ("learners", "count", "limit", "decay", "tau"),
    [(1, 9, 0.0, 0.0, 0.0), (3, 2500, 0.3, 0.1, 0.2), (1, 20, 0.0, 0.0, 1.0)],
)
def test_steps(
    device: torch.device, close: Close, learners: int, count: int, limit: float, decay: float, tau: float
) -> None:
    from llmdpd.kernels import updates

    weights, averages = on(device, learners, count), on(device, learners, count)
    moments, done, lr = (torch.zeros_like(weights), torch.zeros_like(weights)), torch.zeros(learners, 2), torch.empty(1)
    done, lr = done.to(device), lr.to(device)
    exact = [nn.Parameter(row.cpu().double()) for row in weights]
    of_averages, betas = averages.cpu().double(), (0.8, 0.999)
    adams = [torch.optim.AdamW([p], 1.0, betas, 1e-6, decay) for p in exact]
    for number in range(4):
        gradients = on(device, learners, count) * 10.0 ** (1 - number)
        lr.fill_(0.1 / (number + 1))
        done[:, 0] += 1
        settings, average = updates.AdamW(betas, 1e-6, decay, limit), (averages, tau) if tau else None
        norms = updates.step(weights, gradients, moments, done, lr, settings, average).run()
        close(norms, gradients.cpu().double().norm(dim=1), 1e-6)
        for parameter, adam, gradient in zip(exact, adams, gradients.cpu().double(), strict=True):
            parameter.grad = gradient
            if limit:
                nn.utils.clip_grad_norm_([parameter], limit)
            adam.param_groups[0]["lr"] = float(lr)
            adam.step()
        of_averages = of_averages.lerp(torch.stack(list(exact)).detach(), tau)
        close(weights, torch.stack(list(exact)).detach(), 1e-6)
        close(averages, of_averages, 1e-6)


def stacked(device: torch.device, learners: int, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Tensors [L, …], each learner's one after another in memory of its own, with a gap."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = on(device, learners, sum(sizes) + 3) / 3
    return [part.view(learners, *shape) for part, shape in zip(flat[:, :-3].split(sizes, 1), shapes, strict=True)]


@pytest.mark.parametrize(("learners", "K", "T", "H", "S", "A", "B"), [(1, 1, 2, 5, 3, 1, 1), (3, 5, 16, 70, 17, 4, 37)])
def test_time_embedding(
    device: torch.device, close: Close, learners: int, K: int, T: int, H: int, S: int, A: int, B: int
) -> None:
    from llmdpd.kernels import time_rows

    shapes = ((2 * T, T), (2 * T,), (T, 2 * T), (T,), (H, A + T + S))
    parts, gradients = stacked(device, learners, shapes), stacked(device, learners, shapes)
    *own, first = parts
    waves, levels, places = on(device, K, T), torch.randint(K, (learners, B)).to(device), torch.randperm(K).to(device)
    launch, embedded, rows = time_rows.forward(waves, own, first[..., A : A + T])
    launch.run()
    exact = [part.cpu().double().requires_grad_() for part in parts]
    hidden = F.mish(waves.cpu().double() @ exact[0].mT + exact[1][:, None])
    wanted = hidden @ exact[2].mT + exact[3][:, None]
    time_columns = exact[4][..., A : A + T]
    close(embedded, wanted.detach(), 1e-6)
    close(rows, (wanted @ time_columns.mT).detach(), 1e-6)

    # The diffusion loss reads emb as inputs of its first layer, whose gradient W_t has already.
    clean, noise, state = on(device, learners, B, A), on(device, learners, B, A), on(device, learners, B, S)
    alpha_bar = torch.rand(K, device=device)
    launch, inputs = time_rows.noisy_inputs(clean, noise, levels, places, alpha_bar, embedded, state)
    launch.run()
    level = alpha_bar.cpu().double()[levels.cpu()][..., None]
    noisy = level.sqrt() * clean.cpu().double() + (1 - level).sqrt() * noise.cpu().double()
    own_places = places.cpu()[levels.cpu()]
    at_levels = torch.stack([of[place] for of, place in zip(wanted, own_places, strict=True)])
    close(inputs, torch.cat([noisy, at_levels.detach(), state.cpu().double()], 2), 1e-6)

    slopes = on(device, learners, B + 3, H + 2)
    launch, sums = time_rows.level_sums(slopes, levels, places, K, H)
    launch.run()
    of_slopes = slopes[:, :B, :H].cpu().double()
    wanted_sums = torch.zeros(learners, K, H, dtype=torch.float64)
    for number in range(learners):
        wanted_sums[number].index_add_(0, own_places[number], of_slopes[number])
    close(sums, wanted_sums, 1e-6)

    d_rows, kept = on(device, learners, K, H), gradients[4].clone()
    outs = [*gradients[:4], gradients[4][..., A : A + T]]
    time_rows.backward(waves, own, first[..., A : A + T], embedded, (d_rows, sums), outs).run()
    loss = (wanted @ time_columns.mT * d_rows.cpu().double()).sum()
    loss = loss + (wanted @ time_columns.detach().mT * wanted_sums).sum()
    for found, gradient in zip(gradients[:4], torch.autograd.grad(loss, exact[:4], retain_graph=True), strict=True):
        close(found, gradient, 1e-5)
    (of_columns,) = torch.autograd.grad(loss, exact[4])
    close(outs[4], of_columns[..., A : A + T], 1e-5)
    assert torch.equal(gradients[4][..., :A], kept[..., :A]), "what is not the embedding's"
    assert torch.equal(gradients[4][..., A + T :], kept[..., A + T :])
