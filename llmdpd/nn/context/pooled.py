"""The paper's context: each prompt becomes one vector."""

from __future__ import annotations

from torch import Tensor

from llmdpd.nn.context.base import Condition, Context, ContextConfig, EncodedPrompts, spread
from llmdpd.prompts.demonstration import TrajectoryTokens


class PooledContext(Context):
    """z = [z_text, z_traj] (equations 1 and 3) beside the state features; see `Context`."""

    def __init__(self, state_dim: int, action_dim: int, embedding_dim: int, config: ContextConfig) -> None:
        super().__init__(state_dim, action_dim, embedding_dim, config)
        self.state_dim = self.features.output_dim

    def remember(
        self, pooled: Tensor, steps: Tensor | None, tokens: TrajectoryTokens | None, given: Tensor | None
    ) -> dict[str, Tensor]:
        """Nothing: the vectors are all."""
        return {}

    def condition(self, state: Tensor, prompts: EncodedPrompts, index: Tensor | None, clock: Tensor) -> Condition:
        """The state's features and its prompt's vector; the pooled context has no use for the clock."""
        features, pooled = self.features(state), prompts.pooled
        return Condition(features, pooled[0] if len(pooled) == 1 else spread(pooled, index, len(features)))
