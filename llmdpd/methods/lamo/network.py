"""LaMo: a Decision Transformer whose transformer is a language model with low-rank adapters.

Shi et al. 2024 (arXiv 2310.20587). The network is whole in itself: with the language model's layers among its weights
it is saved and loaded like any other. What the language loss needs beside them, the words, is in
`llmdpd.methods.lamo.language_model`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from llmdpd.errors import located
from llmdpd.methods.decision_transformer import DecisionTransformer
from llmdpd.methods.lamo.backbone import AdaptedTransformer, LanguageSizes, LoRAConfig, adapted_transformer
from llmdpd.nn.acting import ActingConfig
from llmdpd.nn.config import NetworkConfig
from llmdpd.nn.context import ContextConfig, EncodedPrompts
from llmdpd.nn.episode_memory import History
from llmdpd.nn.features import FeatureKind
from llmdpd.utils.bounds import Bounds, Fraction, Steps
from llmdpd.utils.options import NO_OPTION


@dataclass(frozen=True)
class LanguageSequenceConfig:
    """What the language model is shown of an episode."""

    context: Steps = 20
    """K, steps that are seen: the present one and those before it."""
    dropout: Fraction = 0.1
    """Dropout inside the transformer, probability."""
    longest: Annotated[int, Bounds(1, 1_000_000)] = 1000
    """Time steps that have an embedding of their own; later ones share the last."""


@dataclass(frozen=True)
class LaMoNetworkConfig(NetworkConfig):
    """A Decision Transformer that is made of a language model."""

    features: FeatureKind = "normalised"
    """State features; see the context of policy diffusion."""
    sequence: LanguageSequenceConfig = field(default_factory=LanguageSequenceConfig)
    """What the language model is shown of an episode."""
    language: Annotated[LanguageSizes, NO_OPTION] = field(default_factory=LanguageSizes)
    """Sizes of the language model; read from its config.json."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """The adapters of the language model."""

    def context_config(self) -> ContextConfig:
        return ContextConfig("pooled", text=False, trajectory=False, features=self.features)


class LanguageDecisionTransformer(DecisionTransformer):
    """Tokens return-to-go, state, action, each by an MLP of its own → a language model → MLP: the action.

    As the authors' code has it, the time step is added after the tokens' norm, and the head has no bound: actions are
    cut to the bound when acting. The language model's own weights, random here until `load_blocks`, do not train.

    Raises:
        InputError: peft is not installed.
    """

    model: AdaptedTransformer
    heads: ClassVar[tuple[str, ...]] = ()  # its adapters learn in any case

    def _build(self, feature_dim: int, action_dim: int, config: LaMoNetworkConfig) -> None:
        sizes = config.language
        self.embed = StepMLPs(feature_dim, action_dim, sizes.width, config.sequence.longest)
        self.norm = nn.Identity()  # the embedding's own lies before the time step's
        with located(field="network.language"):
            self.model = adapted_transformer(sizes, config.sequence.dropout, config.lora)
        self.head = nn.Sequential(nn.Linear(sizes.width, sizes.width), nn.GELU(), nn.Linear(sizes.width, action_dim))

    def _actions(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)

    def action(
        self, history: History, prompts: EncodedPrompts, index: Tensor | None, acting: ActingConfig, seeds: Tensor
    ) -> Tensor:
        """The action of the present step of B episodes, [B, A], within the bound; there is nothing random in it."""
        bound = self.config.action_bound
        return super().action(history, prompts, index, acting, seeds).clamp(-bound, bound)

    def sharing_copy(self) -> LanguageDecisionTransformer:
        """A copy whose language model's own weights, which no one changes, are these and not copied."""
        frozen = {id(weight): weight for weight in self.model.frozen()}
        return copy.deepcopy(self, frozen)

    def learned(self) -> Learned:
        """What of it is learned, as a module of the same tensors."""
        return Learned(self)


class Learned(nn.Module):
    """A network without its language model's own weights: what a checkpoint holds of it and what an EMA follows."""

    def __init__(self, network: LanguageDecisionTransformer) -> None:
        super().__init__()
        for name, part in network.named_children():
            if part is not network.model:
                self.add_module(name, part)
        self.register_buffer("return_scale", network.return_scale)
        self.adapters = nn.ParameterList(network.model.adapters())

    def others(self) -> list[nn.Parameter]:
        """The learned weights outside the language model."""
        adapters = {id(weight) for weight in self.adapters}
        return [weight for weight in self.parameters() if id(weight) not in adapters]


class StepMLPs(nn.Module):
    """Steps as tokens: return-to-go, state features, action by residual MLPs, normed, and the time step's embedding."""

    def __init__(self, feature_dim: int, action_dim: int, width: int, longest: int) -> None:
        super().__init__()
        self.returns, self.states = ResidualMLP(1, width), ResidualMLP(feature_dim, width)
        self.actions = ResidualMLP(action_dim, width)
        self.norm = nn.LayerNorm(width)
        self.time = nn.Embedding(longest, width)

    def forward(self, returns: Tensor, features: Tensor, actions: Tensor, timesteps: Tensor) -> Tensor:
        """Returns [B, T], features [B, T, F], actions [B, T, A], time steps [B, T] → tokens [B, 3 T, W], by step."""
        time = self.time(timesteps.long().clamp(0, self.time.num_embeddings - 1))
        parts = (self.returns(returns[..., None]), self.states(features), self.actions(actions))
        return (self.norm(torch.stack(parts, dim=2)) + time[:, :, None]).flatten(1, 2)


class ResidualMLP(nn.Module):
    """h = W1 x + b1; h + W2 GELU(h) + b2."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] → [..., width]."""
        hidden = self.first(x)
        return hidden + self.second(nn.functional.gelu(hidden))
