"""How many operations the work needs, whoever does it: what shares of the machine's limit are computed from.

A multiply-add counts as two. Counted are the matrix products that the mathematics needs once everything that does not
change is computed once: the state's part of a first layer once a state, the prompt's part once a task. Whoever computes
more than that (the eager peers do) is not credited for it. Activations, noise and optimisers are left out; so is the
time embedding, which is K rows.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Sizes of the noise network, and of critics of the same width. Defaults: the table of floors."""

    state: int = 39
    action: int = 4
    prompt: int = 256
    hidden: int = 256


def _hidden_layers(sizes: Sizes, outputs: int) -> int:
    """Multiply-adds a row from the first hidden layer's output on."""
    return 2 * sizes.hidden**2 + sizes.hidden * outputs


def chain_forward(sizes: Sizes, batch: int, steps: int, samples: int = 1) -> float:
    """The reverse chain: the context once, then K times the action's columns, two hidden layers and the output."""
    h = sizes.hidden
    context = batch * sizes.state * h + sizes.prompt * h
    step = sizes.action * h + _hidden_layers(sizes, sizes.action)
    return 2.0 * (context + batch * samples * steps * step)


def chain_both(sizes: Sizes, batch: int, steps: int) -> float:
    """Forward and backward: each product has two more of its size, for the gradients of its input and of its weight.

    Activations that an implementation computes anew in its backward are not counted again.
    """
    return 3.0 * chain_forward(sizes, batch, steps)


def critic_forward(sizes: Sizes, batch: int, samples: int = 1) -> float:
    """One of the two critics at `samples` actions a state; the state's columns once a state."""
    h = sizes.hidden
    shared = batch * sizes.state * h + sizes.prompt * h
    return 2.0 * (shared + batch * samples * (sizes.action * h + _hidden_layers(sizes, 1)))


def best_of(sizes: Sizes, critic: Sizes, batch: int, steps: int, samples: int) -> float:
    """One action a state, chosen among `samples` by both critics."""
    return chain_forward(sizes, batch, steps, samples) + 2 * critic_forward(critic, batch, samples)


def train_step(actor: Sizes, critic: Sizes, batch: int, steps: int) -> float:
    """One iteration of Diffusion-QL's algorithm, without prompt encoders.

    Critics: target actions by the chain, the two target critics there, the two critics forward and backward. Actor: the
    diffusion loss forward and backward, the chain forward and backward, both critics at its actions, and one of them
    backward to the actions alone. Nothing needs the gradient of a state or of a drawn action: that product is left out
    wherever a backward is counted. The prompt's is needed where there is a prompt, since its encoders learn from it.
    """
    h = actor.hidden
    states, actions = 2.0 * batch * actor.state * h, 2.0 * batch * actor.action * h
    denoise = states + actions + 2.0 * (actor.prompt * h + batch * _hidden_layers(actor, actor.action))
    one_critic = critic_forward(critic, batch)
    critic_input = 2.0 * batch * (critic.state + critic.action) * critic.hidden + 2.0 * critic.prompt * critic.hidden
    critics = chain_forward(actor, batch, steps) + 2 * one_critic + 2 * (3 * one_critic - critic_input)
    to_actions = 2.0 * batch * (_hidden_layers(critic, 1) + critic.action * critic.hidden)
    diffusion_loss = 3 * denoise - states - actions
    chain = chain_both(actor, batch, steps) - states - actions
    return critics + diffusion_loss + chain + 2 * one_critic + to_actions


def text_head(inputs: int, hidden: int, outputs: int) -> float:
    """The text prompt's three layers, one prompt, forward."""
    return 2.0 * (inputs * hidden + hidden**2 + hidden * outputs)


def trajectory_encoder(features: int, width: int, inner: int, layers: int, tokens: int, outputs: int) -> float:
    """The trajectory prompt's transformer and head, one prompt of `tokens` steps, forward."""
    position = 12  # sines and cosines of the encoder's six frequencies
    token = (features + position) * width + layers * (4 * width**2 + 2 * tokens * width + 2 * width * inner)
    return 2.0 * (tokens * token + width**2 + width * outputs)


def prompted_train_step(actor: Sizes, critic: Sizes, batch: int, steps: int, encoders: float) -> float:
    """The whole of LLMDPD: `train_step`, and the encoders (`encoders`: forward), with gradient and without."""
    return train_step(actor, critic, batch, steps) + (3 + 1) * encoders
