"""`Policy`: a trained policy, told what to do by a text and an example trajectory; numpy in, numpy out."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from llmdpd.errors import InputError, located
from llmdpd.methods.acting import ActingConfig, draw_actions
from llmdpd.methods.networks import make_network, method_of
from llmdpd.methods.trajectory_diffusion.network import PlanPolicy
from llmdpd.nn.actor import ActorPolicy
from llmdpd.nn.context import Condition, EncodedPrompts, RetrievalContext
from llmdpd.nn.critic import DoubleQ
from llmdpd.nn.episode_memory import EpisodeMemory, History
from llmdpd.nn.history_policy import HistoryPolicy, asked_returns, check_targets
from llmdpd.nn.policy_network import ConditionalPolicy, PolicyConfig, PromptedNetwork
from llmdpd.policy.action_chunks import ChunkPlayer
from llmdpd.policy.folder import (
    DESCRIPTION,
    SIZE_LIMITS,
    PolicySizes,
    load_tensors,
    read_policy_folder,
    resolve_policy,
    text_key,
    write_policy_folder,
)
from llmdpd.policy.inputs import Example, read_examples, read_observations, read_rewards
from llmdpd.policy.views import mean_over_views, observations_in_views, seeds_in_views, tokens_in_views
from llmdpd.prompts import TextPrompt
from llmdpd.prompts.demonstration import TrajectoryTokens
from llmdpd.prompts.models import LLMIdentity
from llmdpd.tasks.metaworld.layout import ACTION_DIM
from llmdpd.utils.bounds import LIMITS, check_limits
from llmdpd.utils.device import check_device
from llmdpd.utils.plain import from_plain, to_plain

_log = logging.getLogger(__name__)

_ROWS = 8


class Policy:
    """A policy that acts under prompts.

    `Policy.load(path).prompt(text=…, trajectory=…)`, then at each episode's start `.reset()`, then `.act(observation)`.
    One with chunks (`policy.chunk` H above 1) draws H actions at one look and plays the first `replan` of them. A
    Decision Transformer, and MTDiff, is told the rewards too: `.act(observation, reward=…)`.

    Args:
        network: encoders and denoising network, of policy or of trajectory diffusion.
        critic: for the choice among several draws; None where there is none.
        acting: how actions are drawn and chosen.
        llm: name of the text model that the policy was trained with (see `LLMEncoder`).
        texts: LLM embeddings [D] of known texts, by `text_key`.
        facts: what it was trained on and how, kept with the policy. Of them it uses `llm` (an `LLMIdentity`): which
            revision of the text model embedded its texts, and in which dtype; and `target_returns`, task → the return
            that a policy which looks back asks for.

    Raises:
        InputError: more actions of a chunk to be played than it has; critics, which value single actions, with
            chunks; views of a scene by a policy that can't look at them.
    """

    def __init__(
        self,
        network: PromptedNetwork,
        critic: DoubleQ | None,
        acting: ActingConfig,
        *,
        llm: str = "minilm",
        texts: Mapping[str, Tensor] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.critic = None if critic is None else critic.eval().requires_grad_(False)
        self.acting, self.llm = acting, llm
        self.texts = dict(texts or {})
        self.facts = dict(facts or {})
        with located(field="acting"):
            self._chunks = ChunkPlayer(self.replan)
        if critic is not None and network.config.chunk > 1:
            raise InputError(
                "critics value single actions, and this policy draws chunks",
                field="policy.chunk",
                found=network.config.chunk,
                expected="1, or no critics",
            )
        if acting.views > 1 and not isinstance(network, ConditionalPolicy):
            found = f"{acting.views}, with {method_of(network)}"
            raise InputError("only policy diffusion looks at views", field="acting.views", found=found, expected=1)
        features = network.context.features.kind
        if acting.views > 1 and (features != "relative" or network.action_dim != ACTION_DIM):
            raise InputError(
                "views need Meta-World's actions, and features that leave out where and how things are turned",
                field="acting.views",
                found=f"{acting.views}, with {network.action_dim} action numbers and {features} features",
                expected=f"1, or {ACTION_DIM} action numbers and relative features",
            )
        self._prompts: EncodedPrompts | None = None
        self._memory = self.memory()
        self._target: float | None = None
        self._step = 0
        self.seed(0)

    def __repr__(self) -> str:
        network, tasks = self.network, ", ".join(self.facts.get("trained_on", ())) or "unknown tasks"
        prompted = "prompted" if self._prompts is not None else "no prompt yet"
        return (
            f"<Policy of {network.state_dim} state and {network.action_dim} action numbers, "
            f"{network.config.context.kind} context, trained on {tasks}; {prompted}>"
        )

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.network.alpha_bar.device

    @property
    def replan(self) -> int:
        """Actions of each chunk that are played before the next is drawn; 1 where every action is drawn by itself."""
        return self.acting.played(self.network.config)

    @classmethod
    def load(cls, source: str | os.PathLike[str], device: str = "cpu") -> Policy:
        """Load from a policy folder, a run folder, or a Hugging Face hub id.

        Raises:
            InputError: nothing there, a missing or altered file, another version, a device that is absent.
        """
        place = check_device(device)
        path = resolve_policy(source)
        description, tensors = read_policy_folder(path)
        file = path / DESCRIPTION
        with located(path=file):
            sizes = from_plain(PolicySizes, description["sizes"], file, "sizes.")
            check_limits(sizes, SIZE_LIMITS, "sizes")
            acting = from_plain(ActingConfig, description["acting"], file, "acting.")
            network = _build_network(description.get("method", "llmdpd"), sizes, description["policy"], acting, file)
            if "llm" in description["facts"]:
                from_plain(LLMIdentity, description["facts"]["llm"], file, "facts.llm.")
            check_targets(description["facts"].get("target_returns", {}))
        load_tensors(network, tensors["model"], path / "model.safetensors")
        critic = None
        if "critic" in tensors:
            if sizes.critic_hidden is None:
                raise InputError("the critics' width is missing", path=file, field="sizes.critic_hidden")
            prompt_dim = network.context.prompt_dim if sizes.critic_sees_prompts else 0
            critic = DoubleQ(network.context.state_dim, sizes.action_dim, prompt_dim, sizes.critic_hidden)
            load_tensors(critic, tensors["critic"], path / "critic.safetensors")
            critic.to(place)
        with located(path=file):
            return cls(
                network.to(place),
                critic,
                acting,
                llm=description["llm"],
                texts=tensors["texts"],
                facts=description["facts"],
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy folder, whole or not at all; one that was there is replaced."""
        network, critic = self.network, self.critic
        sizes = PolicySizes(
            network.state_dim,
            network.action_dim,
            network.embedding_dim,
            critic_hidden=critic.hidden_dim if critic else None,
            critic_sees_prompts=bool(critic and critic.prompt_dim),
        )
        description = {
            "method": method_of(network),
            "sizes": to_plain(sizes),
            "policy": to_plain(network.config),
            "acting": to_plain(self.acting),
            "llm": self.llm,
            "facts": self.facts,
        }
        tensors = {"model": network.state_dict(), "texts": self.texts}
        if critic is not None:
            tensors["critic"] = critic.state_dict()
        write_policy_folder(Path(path), description, tensors)

    def with_acting(self, **changes: Any) -> Policy:
        """The same policy acting in another way: fields of `ActingConfig`."""
        acting = dataclasses.replace(self.acting, **changes)
        return Policy(self.network, self.critic, acting, llm=self.llm, texts=self.texts, facts=self.facts)

    def prompt(
        self,
        text: str | TextPrompt | None = None,
        trajectory: Example | None = None,
        target_return: float | None = None,
    ) -> Policy:
        """Say what to do: a text prompt, and one example (a `Trajectory`, or observations [T, S] and actions [T, A]).

        `target_return` is what a policy that looks back asks for; by default what the example that it reads has earned,
        or where it reads none the mean over the tasks that it was trained on. Other policies have no use for it.

        Returns the policy itself. The LLM is loaded only for a text that neither the policy nor the embedding cache
        knows.

        Raises:
            InputError: a prompt that the policy needs and doesn't get, or gets and was not trained with; an example of
                the wrong width or too long; a text model of another width than the one in training.
        """
        if target_return is not None and not np.isfinite(target_return):
            found = target_return
            raise InputError("wrong return", field="target_return", found=found, expected="a finite number")
        self._prompts = self.encode_prompts([text], [trajectory])
        self._target = target_return
        if self._memory is not None and target_return is None:
            self._target = float(self.target_returns([None], [trajectory])[0])
        self.reset()
        return self

    def encode_prompts(
        self, texts: Sequence[str | TextPrompt | None], trajectories: Sequence[Example | None]
    ) -> EncodedPrompts:
        """Read P prompts at once, for `act_many`; where it acts by views and examples are given, in each of the views.

        Raises:
            InputError: as `prompt`; or a kind of prompt that is given for some of the P and not for others.
        """
        return self._encode(texts, trajectories, self.acting.views)

    def _encode(
        self, texts: Sequence[str | TextPrompt | None], trajectories: Sequence[Example | None], views: int
    ) -> EncodedPrompts:
        config = self.network.config.context
        words = [text for text in texts if text is not None]
        examples = [example for example in trajectories if example is not None]
        for name, given, count in (("text", len(words), len(texts)), ("trajectory", len(examples), len(trajectories))):
            if 0 < given < count:
                found = f"{given} of {count}"
                raise InputError("prompts are given for all or for none", field=name, found=found, expected=count)
            if given and not getattr(config, name):
                raise InputError(f"this policy was trained without {name} prompts", field=name, expected="none")
        embeddings = torch.stack([self._embed(text) for text in words]).to(self.device) if words else None
        tokens = self._tokens(examples) if examples else None
        if tokens is None:
            views = 1
        elif views > 1:
            tokens = tokens_in_views(tokens, views)
            embeddings = None if embeddings is None else embeddings.repeat(views, 1)
        with torch.no_grad():
            tokens = None if tokens is None else tokens.to(self.device)
            return dataclasses.replace(self.network.encode(embeddings, tokens), views=views)

    @property
    def retrieves(self) -> bool:
        """Whether it looks for waypoints in its example, so that `looks` can tell where."""
        context = self.network.config.context
        own = isinstance(self.network.context, RetrievalContext)
        return own and context.trajectory and context.retrieval.waypoints

    def looks(
        self, text: str | TextPrompt, trajectory: Example, observations: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Where in its example the policy looks during an episode: observations [L, S] from its start on.

        Returns the waypoint heads' weights f32 [L, heads, T] on the T steps that are read, and those steps' times [T].

        Raises:
            InputError: as `prompt`.
            ValueError: a policy that doesn't retrieve.
        """
        context = self.network.context
        if not self.retrieves or not isinstance(context, RetrievalContext):
            raise ValueError("this policy retrieves nothing from its example")
        prompts = self._encode([text if self.network.config.context.text else None], [trajectory], 1)
        with torch.no_grad():
            state = torch.from_numpy(observations).to(self.device)
            weights = context.weights(state, prompts, torch.arange(len(state), device=self.device))
        return weights[..., :-1].cpu().numpy(), self._tokens([trajectory]).times[0].numpy()

    def reset(self) -> None:
        """Start an episode: the clock goes back to 0, and what is left of a chunk is dropped."""
        self._step = 0
        self._chunks.reset()
        if self._memory is not None:
            self._memory.reset()

    def seed(self, seed: int) -> None:
        """Fix the noise of all actions from here on; what is left of a chunk was drawn before, and is dropped."""
        self._chunks.reset()
        self._random = torch.Generator().manual_seed(seed)

    def memory(self) -> EpisodeMemory | None:
        """A new memory of episodes, for `draw_many`; None where the policy looks at the present state alone.

        Raises:
            InputError: a way of acting that a policy without diffusion does not have.
        """
        network = self.network
        if not isinstance(network, HistoryPolicy):
            return None
        network.check_acting(self.acting)
        return EpisodeMemory(network.history, network.action_dim)

    def target_returns(self, tasks: Sequence[str | None], examples: Sequence[Example | None]) -> NDArray[np.float32]:
        """The returns that such a policy asks for of B tasks, told by B examples: see `asked_returns`."""
        read = self.network.config.context.trajectory
        return asked_returns(self.facts.get("target_returns", {}), tasks, examples if read else None)

    def act(
        self, observation: ArrayLike, step: int | None = None, reward: ArrayLike | None = None
    ) -> NDArray[np.float32]:
        """Observation [S] → action [A], or [B, S] → [B, A], all under the one prompt.

        The time step counts by itself from `reset()`; `step` sets it. Row i is the same episode from call to call. With
        chunks, an observation is looked at where a chunk is drawn: after `reset()`, after the last one's `replan`
        actions, and where the clock was set to another step than the next. `reward`, of the last action (a number, or
        [B]), is taken off the return that a policy which looks back asks for, and which stays as it is without; other
        policies have no use for it.

        Raises:
            InputError: no prompt yet, or an observation of another width, or that is no finite numbers.
        """
        if self._prompts is None:
            raise InputError("the policy has no prompt yet", expected="prompt(text=…, trajectory=…) before act()")
        state = read_observations(observation, self.network.state_dim)
        rows = np.atleast_2d(state)
        self._step = self._step if step is None else step
        rewards = read_rewards(reward, len(rows))
        actions = self._chunks.play(
            np.arange(len(rows)), np.full(len(rows), self._step), lambda due: self._look(rows[due], rewards[due])
        )
        self._step += 1
        return actions[0] if state.ndim == 1 else actions

    def _look(self, rows: NDArray[np.float32], rewards: NDArray[np.float32]) -> NDArray[np.float32]:
        """Chunks [B, H, A] for the observations [B, S] of the current time step, under the policy's own prompt."""
        assert self._prompts is not None, "checked in act"
        seeds = torch.randint(2**63 - 1, (len(rows),), generator=self._random).numpy()
        episodes, steps = np.arange(len(rows)), np.full(len(rows), self._step)
        if self._memory is None:
            return self.draw_many(rows, self._prompts, None, steps, seeds)
        targets = np.full(len(rows), self._target, np.float32)
        history = self._memory.recall(episodes, steps, rows, rewards, targets)
        drawn = self.draw_many(rows, self._prompts, None, steps, seeds, history)
        self._memory.note(episodes, drawn[:, 0])
        return drawn

    def act_many(
        self,
        observations: NDArray[np.float32],
        prompts: EncodedPrompts,
        index: NDArray[np.int64] | None,
        steps: NDArray[np.int64],
        seeds: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Act for many episodes at once, of several tasks, each by a look of its own: of chunks, the first action.

        As `draw_many` otherwise → [B, A].
        """
        return self.draw_many(observations, prompts, index, steps, seeds)[:, 0]

    def draw_many(
        self,
        observations: NDArray[np.float32],
        prompts: EncodedPrompts,
        index: NDArray[np.int64] | None,
        steps: NDArray[np.int64],
        seeds: NDArray[np.int64],
        history: History | None = None,
    ) -> NDArray[np.float32]:
        """Draw a chunk for each of many episodes at once, of several tasks: but for rounding it depends on its own row.

        observations [B, S]; index [B] into the prompts that were given (None: the rows lie in equal groups, one a
        prompt, in order; of a policy that looks back, under one prompt); steps [B] within the episodes; seeds [B]
        → actions [B, H, A], H being 1 where every action is drawn by itself. `ChunkPlayer` plays them.
        `history`: what `memory()` shows of each episode, where the policy looks back.

        Raises:
            ValueError: no history for a policy that looks back; without index rows that don't share out evenly.
        """
        if index is None and len(observations) * prompts.views % len(prompts):
            raise ValueError(f"{len(observations)} rows do not share out among {len(prompts) // prompts.views} prompts")
        if prompts.views == 1:
            return self._draw_rows(observations, prompts, index, steps, seeds, history)
        views, count = prompts.views, len(observations)
        if index is not None:
            rows = _filled(count)
            observations, steps, seeds = observations[rows], steps[rows], seeds[rows]
            index = np.concatenate([index[rows] + first for first in range(0, len(prompts), len(prompts) // views)])
        drawn = self._draw_rows(
            observations_in_views(observations, views),
            prompts,
            index,
            np.tile(steps, views),
            seeds_in_views(seeds, views),
        )
        return mean_over_views(drawn, views)[:count]

    def _draw_rows(
        self,
        observations: NDArray[np.float32],
        prompts: EncodedPrompts,
        index: NDArray[np.int64] | None,
        steps: NDArray[np.int64],
        seeds: NDArray[np.int64],
        history: History | None = None,
    ) -> NDArray[np.float32]:
        """`draw_many` of rows that are what is seen, under rows of prompts that are what is told."""
        place, count = self.device, len(observations)
        rows = _filled(count) if index is not None or len(prompts) == 1 else np.arange(count)
        own = None if index is None else torch.from_numpy(index[rows]).to(place)
        with torch.no_grad():
            if isinstance(self.network, HistoryPolicy):
                if history is None:
                    raise ValueError("this policy looks back: it needs the history that memory() shows")
                keys = torch.from_numpy(seeds[rows]).to(place)
                drawn = self.network.draw(history.take(rows).to(place), prompts, own, self.acting, keys)
                return drawn[:count, None].cpu().numpy()
            state, clock = (torch.from_numpy(part[rows]).to(place) for part in (observations, steps))
            condition = self.network.condition(state, prompts, own, clock)
            prompt = condition.prompt if condition.prompt.dim() == 1 else condition.prompt[:count]
            keys = torch.from_numpy(seeds).to(place)
            return self._draw(state[:count], Condition(condition.state[:count], prompt), keys).cpu().numpy()

    def _draw(self, state: Tensor, condition: Condition, keys: Tensor) -> Tensor:
        """Actions [B, H, A] in the conditions of states [B, S], by the method's own network."""
        if isinstance(self.network, PlanPolicy):
            return self.network.draw(state, condition, self.acting, keys)[:, :1]  # plans are drawn anew at every step
        if isinstance(self.network, ActorPolicy):
            return self.network.draw(condition, self.acting, keys)[:, None]
        assert isinstance(self.network, ConditionalPolicy)
        config = self.network.config
        drawn = draw_actions(self.network.net, self.critic, condition, self.acting.plan(config), self.acting, keys)
        return drawn.unflatten(1, (config.chunk, self.network.action_dim))

    def _embed(self, text: str | TextPrompt) -> Tensor:
        rendered = text.render() if isinstance(text, TextPrompt) else text
        key = text_key(rendered)
        if key not in self.texts:
            from llmdpd.prompts import LLMEncoder

            trained = self.facts.get("llm")
            encoder = LLMEncoder(self.llm, device=self.device, dtype=trained["dtype"] if trained else None)
            now = to_plain(encoder.identity)
            if trained and now != trained:
                _log.warning("the text model is another one than in training: %s, then %s", now, trained)
            vector = encoder.encode([rendered])[0]
            if len(vector) != self.network.embedding_dim:
                raise InputError(
                    "the text model has another width than the one that the policy was trained with",
                    field="llm",
                    found=f"{self.llm}: {len(vector)} numbers",
                    expected=f"{self.network.embedding_dim}",
                )
            self.texts[key] = vector
        return self.texts[key]

    def _tokens(self, examples: Sequence[Example]) -> TrajectoryTokens:
        network = self.network
        rewards = isinstance(network, HistoryPolicy) and network.reads_rewards
        sizes = network.state_dim, network.action_dim
        return read_examples(examples, *sizes, network.config.context.encoder, rewards)


def _filled(count: int) -> NDArray[np.int64]:
    """Rows 0 … count - 1, the last one again up to a multiple of eight.

    Many a matrix product rounds a row by how many there are; by multiples of eight less often.
    """
    return np.minimum(np.arange(count + -count % _ROWS), count - 1)


def _build_network(method: str, sizes: PolicySizes, config: Any, acting: ActingConfig, file: Path) -> PromptedNetwork:
    """The network of a policy's description, with values that no network can have refused."""
    policy = from_plain(PolicyConfig, config, file, "policy.")
    check_limits(policy, LIMITS, "policy")
    with located(field="policy"):
        policy.check()
    with located(field="acting"):
        acting.plan(policy)
        acting.played(policy)
    return make_network(method, sizes.state_dim, sizes.action_dim, sizes.embedding_dim, policy)
