"""Decision Transformers: actions as the continuation of an episode, given the return that is asked for.

Chen et al. 2021 (arXiv 2106.01345); with a trajectory prompt before it, Xu et al. 2022 (arXiv 2206.13499).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from llmdpd.context import ALL_KEPT, EncodedPrompts, Keep
from llmdpd.errors import InputError
from llmdpd.history import History
from llmdpd.policy_network import PolicyConfig, PromptedNetwork
from llmdpd.prompts.trajectory import TrajectoryTokens
from llmdpd.sequence_model import CausalTransformer


class DecisionTransformer(PromptedNetwork):
    """Tokens return-to-go, state, action of each step → GPT-2 → bound tanh of the state token's output: the action.

    Time steps are embedded and added to all three tokens of a step. States are read by the features that all methods
    have; returns are scaled by the greatest of the training data.

    Raises:
        InputError: chunks, or a text prompt, which it does not read.
    """

    return_scale: Tensor
    prompted = False
    """Whether it reads an example."""

    def __init__(self, state_dim: int, action_dim: int, embedding_dim: int, config: PolicyConfig) -> None:
        _check(config, self.prompted)
        # It reads its example itself, step by step: no encoder of the context's.
        bare = replace(config, context=replace(config.context, kind="pooled", text=False, trajectory=False))
        super().__init__(state_dim, action_dim, embedding_dim, bare)
        self.config = config
        sizes = config.sequence
        width = sizes.width
        self.embed_return, self.embed_action = nn.Linear(1, width), nn.Linear(action_dim, width)
        self.embed_state = nn.Linear(self.context.features.output_dim, width)
        self.embed_time = nn.Embedding(sizes.longest, width)
        self.norm = nn.LayerNorm(width)
        self.model = CausalTransformer(sizes)
        self.head = nn.Linear(width, action_dim)
        self.register_buffer("return_scale", torch.ones(()))

    @property
    def history(self) -> int:
        """K, steps of the episode that it sees."""
        return self.config.sequence.context

    def fit_returns(self, returns: Tensor) -> None:
        """Take the scale of the training data's returns-to-go [N]."""
        self.return_scale.copy_(returns.abs().max().clamp_min(1e-6))

    def forward(
        self,
        returns: Tensor,
        states: Tensor,
        actions: Tensor,
        clock: Tensor,
        prompts: EncodedPrompts | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """The action that each step of B windows calls for, from what lies before it → [B, T, A].

        Args:
            returns: [B, T], returns-to-go, as they are. states: [B, T, S]. actions: [B, T, A]. clock: [B, T].
            prompts: where it reads an example, P of them.
            index: [B], which prompt each window is under; None: P equal groups in order.
        """
        count, steps = returns.shape
        tokens, mask = self._steps(returns, states, actions, clock), None
        if prompts is not None and prompts.memory:
            before, given = prompts.memory["tokens"], prompts.memory["mask"]
            if index is None:
                before, given = (part.repeat_interleave(count // len(part), 0) for part in (before, given))
            else:
                before, given = before[index], given[index]
            tokens = torch.cat([before, tokens], dim=1)
            mask = torch.cat([given, given.new_ones(count, 3 * steps)], dim=1)
        hidden = self.model(self.norm(tokens), mask)[:, -3 * steps :]
        # Of each step the state's token, which has not seen the action yet.
        return self.config.action_bound * torch.tanh(self.head(hidden[:, 1::3]))

    def draw(self, history: History, prompts: EncodedPrompts, index: Tensor | None) -> Tensor:
        """The action of the present step of B episodes → [B, A]."""
        found = self(history.returns, history.states, history.actions, history.clock, prompts, index)
        present = (history.lengths - 1)[:, None, None].expand(-1, 1, found.shape[-1])
        actions: Tensor = found.gather(1, present)[:, 0]
        return actions

    def _steps(self, returns: Tensor, states: Tensor, actions: Tensor, clock: Tensor) -> Tensor:
        """The embedded tokens [B, 3 T, W]: return, state, action, step by step."""
        time = self.embed_time(clock.long().clamp(0, self.config.sequence.longest - 1))
        parts = (
            self.embed_return((returns / self.return_scale)[..., None]),
            self.embed_state(self.context.features(states)),
            self.embed_action(actions),
        )
        return torch.stack([part + time for part in parts], dim=2).flatten(1, 2)


class PromptDecisionTransformer(DecisionTransformer):
    """The same with an example's steps before the episode's, as tokens of the same kind (Prompt-DT)."""

    prompted = True

    def encode(self, text: Tensor | None, tokens: TrajectoryTokens | None, keep: Keep = ALL_KEPT) -> EncodedPrompts:
        """Embed the steps of P examples.

        Raises:
            InputError: no example, or one without rewards: its returns-to-go are part of what is read.
        """
        if tokens is None or tokens.returns is None:
            raise InputError(
                "a Prompt Decision Transformer reads an example with its rewards",
                field="trajectory",
                found="no example" if tokens is None else "observations and actions alone",
                expected="an example with rewards (llmdpd.data.Trajectory)",
            )
        embedded = self._steps(tokens.returns, tokens.states, tokens.actions, tokens.times)
        mask = tokens.mask.repeat_interleave(3, dim=1)
        if keep.trajectory is not None:
            mask = mask & (keep.trajectory > 0)
        pooled = embedded.new_zeros(len(embedded), 0)
        return EncodedPrompts(pooled, {"tokens": embedded, "mask": mask})


def _check(config: PolicyConfig, prompted: bool) -> None:
    if config.chunk != 1:
        raise InputError("only policy diffusion has chunks", field="policy.chunk", found=config.chunk, expected=1)
    if config.context.text:
        raise InputError("Decision Transformers read no text", field="policy.context.text", found=True, expected=False)
    if config.context.trajectory is not prompted:
        raise InputError(
            "prompt-dt reads an example, dt none",
            field="policy.context.trajectory",
            found=config.context.trajectory,
            expected=prompted,
        )
