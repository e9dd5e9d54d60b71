"""The default policy, which looks into the demonstration: acting and learning at the sizes of the default preset."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import torch
from counting import Sizes, chain_forward, text_head, trajectory_encoder
from numpy.typing import NDArray
from peers import Compiler
from timing import Call
from workloads import ITERATIONS, TEXT

from llmdpd.data.augmentation import AugmentationConfig
from llmdpd.diffusion.reference import reverse_diffusion_reference
from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.llmdpd.method import LLMDPD, LLMDPDConfig
from llmdpd.methods.llmdpd.network import DiffusionNetworkConfig, DiffusionPolicy
from llmdpd.nn import device_features
from llmdpd.nn.acting import BestOfN
from llmdpd.nn.context import ContextConfig, EncodedPrompts
from llmdpd.nn.spaces import Spaces
from llmdpd.ops import device_memory, device_reading, layers, mish_mlp, triton
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig, make_tokens
from llmdpd.tasks.metaworld.layout import LAYOUT
from llmdpd.training.batches import moved

STATE, ACTION, DEMONSTRATION, TASK = 39, 4, 150, "a task"
_EMBEDDING = 12

# The default preset's, which needs the command line's libraries to be read: a test compares them.
METHOD = LLMDPDConfig(
    network=DiffusionNetworkConfig(
        context=ContextConfig(
            "retrieval",
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
_OURS = (
    (layers, "computes"),
    (mish_mlp, "_native"),
    (triton, "computes_mlps"),
    (device_reading, "may_read"),
    (device_memory, "may_read"),
    (device_features, "may_read"),
)
_ours = [getattr(module, name) for module, name in _OURS]


def in_torch(alone: bool) -> None:
    """Whether PyTorch computes everything, as a peer; the chain's definition is its own in any case."""
    for (module, name), own in zip(_OURS, _ours, strict=True):
        setattr(module, name, (lambda *_: False) if alone else own)


def method(quick: bool) -> LLMDPDConfig:
    """The default preset's method; tiny where only its running is of interest."""
    if not quick:
        return METHOD
    config, context = METHOD, METHOD.network.context
    retrieval = dataclasses.replace(context.retrieval, width=16, heads=2)
    encoder = dataclasses.replace(context.encoder, width=16, inner=16, steps=8)
    context = dataclasses.replace(
        context, text_dim=4, text_hidden=8, trajectory_dim=4, encoder=encoder, retrieval=retrieval
    )
    network = dataclasses.replace(config.network, hidden_dim=16, context=context)
    return dataclasses.replace(config, network=network, batch_size=24, prompts_per_batch=4)


def demonstration(rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Observations and actions of random numbers, of a scene's size."""
    observations = rng.normal(0, 0.3, (DEMONSTRATION, STATE)).astype(np.float32)
    return observations, rng.uniform(-1, 1, (DEMONSTRATION, ACTION)).astype(np.float32)


def network_of(config: LLMDPDConfig, device: torch.device) -> DiffusionPolicy:
    network = DiffusionPolicy(Spaces(STATE, ACTION, TEXT, LAYOUT), config.network).to(device)
    network.context.features.fit(0.3 * torch.randn(200, STATE, device=device))
    return network


def policy(quick: bool, device: torch.device) -> Any:
    """The default policy, of random weights, that knows one text.

    Raises:
        ImportError: `llmdpd.policy.policy` can't be imported here.
    """
    from llmdpd.policy.folder import text_key
    from llmdpd.policy.policy import Policy

    config = method(quick)
    return Policy("llmdpd", network_of(config, device), None, config.acting, texts={text_key(TASK): torch.randn(TEXT)})


def our_action(of: Any, observation: NDArray[np.float32], graph: bool = False) -> Call:
    """`Policy.act`, under a text and a demonstration; from a CUDA graph or without.

    It watches for a body that stands still, as by default. The body moves from call to call, and time runs out late, so
    that the tracker never acts.
    """
    policy = of.with_acting(track_after=1e9)
    policy.graphs.mode = "on" if graph else "off"
    policy.prompt(TASK, demonstration(np.random.default_rng(0)))
    moved = observation.copy()
    moved[..., list(LAYOUT.body.at)] += 0.05
    states = itertools.cycle((observation, moved))
    return captured(lambda: policy.act(next(states)), policy, graph)


def captured(act: Call, policy: Any, graph: bool) -> Call:
    """The call of an action, after it was captured where it is to be.

    Raises:
        RuntimeError: it was not.
    """
    for _ in range(5 if graph else 0):
        act()
    if graph and not policy.graphs.captured:
        raise RuntimeError("no CUDA graph was captured")
    return act


def action_in_torch(of: Any, observation: NDArray[np.float32], compiler: Compiler | None) -> Call:
    """The same by our own definition in PyTorch, as it is or compiled, from numpy to numpy."""
    prompts = of.encode_prompts([TASK], [demonstration(np.random.default_rng(0))])
    network, acting = of.network, of.acting
    assert isinstance(network, DiffusionPolicy)
    assert isinstance(acting, BestOfN)
    coefficients = acting.coefficients(network.config)

    def sample(state: torch.Tensor, times: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        found = EncodedPrompts(prompts.pooled, prompts.memory)
        condition = network.context.condition(state, found, None, times)
        return reverse_diffusion_reference(network.net, *condition, coefficients, noise, "fp32")

    run = sample if compiler is None else compiler.compile(sample)
    rows, place = np.atleast_2d(observation), network.device

    @torch.no_grad()
    def call() -> NDArray[np.float32]:
        noise = torch.randn(coefficients.steps + 1, len(rows), 1, ACTION, device=place)
        found = run(torch.from_numpy(rows).to(place), torch.zeros(len(rows), device=place), noise)
        actions: NDArray[np.float32] = found.cpu().numpy()
        return actions

    return call


def action_flops(of: Any, states: int) -> float:
    """Operations of an action a state: the context, then the chain."""
    network = of.network
    assert isinstance(network, DiffusionPolicy)
    context = network.context
    chain = Sizes(context.state_dim, ACTION, context.prompt_dim, network.config.hidden_dim)
    return 2.0 * states * _look_up(network) + chain_forward(chain, states, network.config.diffusion_steps)


def _look_up(network: DiffusionPolicy) -> float:
    """Multiply-adds of one state's context, behind its features."""
    sizes, context = network.context.config.retrieval, network.context
    width, steps = sizes.width, context.config.encoder.steps + 1
    found = ACTION + len(sizes.lookahead) * context.features.geometry_dim
    layer = 6 * width**2 + 2 * steps * width
    query = (context.features.output_dim + _EMBEDDING) * width
    compared = sizes.heads * steps * (context.features.geometry_dim + 1 + found)
    return query + sizes.layers * layer + width**2 + steps * width + compared


class Iteration:
    """A learner by the default preset, and a batch of random numbers that it learns from again and again."""

    def __init__(self, quick: bool, device: torch.device) -> None:
        self.config, rng = method(quick), np.random.default_rng(0)
        self.learner = LLMDPD(network_of(self.config, device), self.config, ITERATIONS)
        prompts, batch = self.config.prompts_per_batch, self.config.batch_size
        shown = [demonstration(rng) for _ in range(prompts)]
        tokens = make_tokens(shown, self.config.network.context.encoder, layout=LAYOUT)
        actions = torch.rand(batch, ACTION) * 2 - 1
        batch_of = PromptedBatch(
            *(0.3 * torch.randn(batch, STATE), actions, torch.randn(batch), 0.3 * torch.randn(batch, STATE)),
            *(torch.zeros(batch), actions.clone(), torch.randint(0, 500, (batch,))),
            text=torch.randn(prompts, TEXT),
            tokens=tokens,
        )
        self.batch = batch_of if device.type == "cpu" else moved(batch_of, device)
        self.iteration = self.config.ema_start

    def update(self) -> object:
        """One iteration."""
        self.iteration += 1
        return self.learner.update(self.batch, self.iteration)

    def flops(self) -> float:
        """Operations of encoders, what is remembered of demonstrations, states, noise network; each with gradients."""
        network, config = self.learner.policy, self.config.network.context
        encoder, width = config.encoder, config.retrieval.width
        prompts, batch, hidden = self.config.prompts_per_batch, self.config.batch_size, self.config.network.hidden_dim
        features = network.context.features.output_dim + ACTION
        read = text_head(TEXT, config.text_hidden, config.text_dim) + trajectory_encoder(
            features, encoder.width, encoder.inner, encoder.layers, encoder.steps, config.trajectory_dim
        )
        remembered = (encoder.steps + 1) * (
            (encoder.width + _EMBEDDING) * width + (2 * config.retrieval.layers + 1) * width**2
        )
        condition, prompt = network.context.state_dim, network.context.prompt_dim
        states = batch * (_look_up(network) + (condition + prompt + 2 * ACTION) * hidden + 2 * hidden**2)
        return 3.0 * (prompts * read + 2.0 * (prompts * remembered + states))
