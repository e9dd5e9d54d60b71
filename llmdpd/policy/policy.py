"""`Policy`: a trained policy, prompted with a text and a demonstration; numpy in, numpy out."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from llmdpd.errors import InputError, located
from llmdpd.methods import METHODS
from llmdpd.nn.acting import ActingConfig
from llmdpd.nn.context import EncodedPrompts
from llmdpd.nn.history_policy import check_targets, target_returns
from llmdpd.nn.policy_network import PolicyNetwork, States
from llmdpd.nn.spaces import Spaces
from llmdpd.policy.folder import DESCRIPTION, read_policy_folder, resolve_policy, text_key, write_policy_folder
from llmdpd.policy.formats import UPGRADES
from llmdpd.policy.inputs import (
    Demonstration,
    Demonstrations,
    each_demonstration,
    read_demonstrations,
    read_observations,
    read_rewards,
)
from llmdpd.prompts import TextPrompt
from llmdpd.prompts.demonstration import TrajectoryTokens
from llmdpd.prompts.source import LLMIdentity
from llmdpd.utils.bounds import check_config
from llmdpd.utils.device import check_device
from llmdpd.utils.plain import from_plain, to_plain
from llmdpd.utils.settings import in_own_settings
from llmdpd.utils.tensors import check_fit, check_tensors, load_tensors, without_memory

_log = logging.getLogger(__name__)
FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


class Policy:
    """A policy that acts under prompts.

    `Policy.load(path).prompt(text=…, trajectory=…)`, then at each episode's start `.reset()`, then `.act(observation)`.
    One with action chunks samples H actions at once and executes the first `action_horizon` of them. A Decision
    Transformer, and MTDiff, needs the rewards too: `.act(observation, reward=…)`.

    Args:
        method: name of the method that trained it.
        network: what acts.
        critic: for the choice among several samples; None where there is none.
        acting: how actions are sampled and chosen.
        llm: name of the text model that the policy was trained with (see `LLMEncoder`).
        texts: LLM embeddings [D] of known texts, by `text_key`.
        metadata: of its training, kept with the policy. Of them it uses `llm` (an `LLMIdentity`): which revision
            of the text model embedded its texts, and in which dtype; and `target_returns`, task → the return that a
            policy which is conditioned on history asks for.

    Raises:
        InputError: a way of acting that is out of bounds, or that the network does not have; NaN or Inf in a weight.
    """

    def __init__(
        self,
        method: str,
        network: PolicyNetwork,
        critic: nn.Module | None,
        acting: ActingConfig,
        *,
        llm: str = "minilm",
        texts: Mapping[str, Tensor] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        check_config(acting, "acting")
        with located(field="acting"):
            acting.check_network(network.config)
        self.method, self.acting, self.llm = method, acting, llm
        self.network = network.eval().requires_grad_(False)
        self.critic = None if critic is None else critic.eval().requires_grad_(False)
        self.texts = dict(texts or {})
        for part in (self.network, self.critic, self.texts):
            _check_finite(part)
        self.metadata = dict(metadata or {})
        self._episodes: Episodes | None = None
        self._step = 0
        self.seed(0)

    def __repr__(self) -> str:
        tasks = ", ".join(self.metadata.get("trained_on", ())) or "unknown tasks"
        prompted = "prompted" if self._episodes is not None else "no prompt yet"
        return (
            f"<Policy of {self.network.spaces.observed_dim} state and {self.network.action_dim} action numbers, "
            f"{self.network.reads.kind} context, trained on {tasks}; {prompted}>"
        )

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.network.device

    @property
    def action_horizon(self) -> int:
        """Actions of each chunk that are executed before the next is sampled; 1 where each is sampled by itself."""
        return self.acting.horizon(self.network.config)

    @property
    def chooses(self) -> bool:
        """Whether critics choose one of several samples."""
        return self.critic is not None and self.acting.describe(self.network.config)["samples"] > 1

    @classmethod
    @in_own_settings
    def load(cls, source: str | os.PathLike[str], device: str = "cpu") -> Policy:
        """Load from a policy folder, a run folder, or `hub:OWNER/NAME` for one of the Hugging Face hub.

        Raises:
            InputError: nothing there, a missing or altered file, another version, weights that are not finite, a device
                that is absent.
        """
        place = check_device(device)
        path = resolve_policy(source)
        description, tensors = read_policy_folder(path, UPGRADES)
        file = path / DESCRIPTION
        with located(path=file):
            kind = METHODS[description["method"]]
            parts = get_type_hints(kind.Config)
            config = from_plain(parts["network"], description["network"], file, "network.")
            acting = from_plain(parts["acting"], description["acting"], file, "acting.")
            check_config(config, "network")
            if "llm" in description["metadata"]:
                from_plain(LLMIdentity, description["metadata"]["llm"], file, "metadata.llm.")
            check_targets(description["metadata"].get("target_returns", {}))
            spaces = from_plain(Spaces, description["spaces"], file, "spaces.")

            def build() -> tuple[PolicyNetwork, nn.Module | None]:
                network = kind.build_network(spaces, config)
                return network, None if description["critic"] is None else network.make_critic(**description["critic"])

            # First without memory, as declared sizes may be any: their tensors must be those that are there.
            with without_memory():
                sketches = dict(zip(("model", "critic"), build(), strict=True))
            for stem, sketch in sketches.items():
                if sketch is not None:
                    check_fit(sketch, tensors[stem], path / f"{stem}.safetensors")
            network, critic = build()
        load_tensors(network, tensors["model"], path / "model.safetensors")
        if critic is not None:
            load_tensors(critic, tensors["critic"], path / "critic.safetensors")
            critic.to(place)
        kept = {"llm": description["llm"], "texts": tensors["texts"], "metadata": description["metadata"]}
        with located(path=file):
            return cls(description["method"], network.to(place), critic, acting, **kept)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy folder, whole or not at all; one that was there is replaced."""
        description = {
            "method": self.method,
            "spaces": to_plain(self.network.spaces),
            "network": to_plain(self.network.config),
            "critic": None if self.critic is None else dict(self.critic.sizes),  # type: ignore[arg-type]
            "acting": to_plain(self.acting),
            "llm": self.llm,
            "metadata": self.metadata,
        }
        tensors = {"model": self.network.state_dict(), "texts": self.texts}
        if self.critic is not None:
            tensors["critic"] = self.critic.state_dict()
        write_policy_folder(Path(path), description, tensors)

    def with_acting(self, **changes: Any) -> Policy:
        """The same policy acting in another way: fields of its `ActingConfig`."""
        acting = dataclasses.replace(self.acting, **changes)
        return Policy(
            self.method, self.network, self.critic, acting, llm=self.llm, texts=self.texts, metadata=self.metadata
        )

    def prompt(
        self,
        text: str | TextPrompt | None = None,
        trajectory: Demonstrations | None = None,
        target_return: float | None = None,
    ) -> Policy:
        """Set the prompts: a text, and a demonstration (a `Trajectory`, or observations [T, S] and actions [T, A]).

        A list of 1 to 16 demonstrations is one prompt: at each step the policy looks for what to do in all of them.
        Demonstrations may be of any length and go on after the success: presets read them up to it and 20 steps
        further (1 where the body then goes far away), without long standing still. The success is known from
        `Trajectory.success_step`, else looked for in the rewards, the way to the goal, or where nothing moves any more;
        the log says what is left out.

        `target_return` is what a policy asks for that is conditioned on history; by default what its demonstration has
        earned, or where it reads none the mean over the tasks that it was trained on. Other policies have no use for
        it. The LLM is loaded only for a text that neither the policy nor the embedding cache knows.

        Returns:
            The policy itself.

        Raises:
            InputError: a prompt that the policy needs and doesn't get, or gets and was not trained with; a
                demonstration of the wrong width or too long; more of them than 16, or several for a policy that takes
                one; a text model of another width than the one in training.
        """
        if target_return is not None and not np.isfinite(target_return):
            found = target_return
            raise InputError("wrong return", field="target_return", found=found, expected="a finite number")
        prompts = self.encode_prompts([text], [trajectory])
        if self.network.memory_length and target_return is None:
            target_return = float(self.target_returns([None], [trajectory])[0])
        self._episodes = self.episodes(prompts, targets=target_return or 0.0)
        self.reset()
        return self

    @in_own_settings
    def encode_prompts(
        self, texts: Sequence[str | TextPrompt | None], trajectories: Sequence[Demonstrations | None]
    ) -> EncodedPrompts:
        """Read P prompts at once, for `episodes`.

        Raises:
            InputError: as `prompt`; or a kind of prompt that is given for some of the P and not for others.
        """
        words = [text for text in texts if text is not None]
        shown = [demonstrations for demonstrations in trajectories if demonstrations is not None]
        for name, given, count in (("text", len(words), len(texts)), ("trajectory", len(shown), len(trajectories))):
            if 0 < given < count:
                found = f"{given} of {count}"
                raise InputError("prompts are given for all or for none", field=name, found=found, expected=count)
            if given and not getattr(self.network.reads, name):
                raise InputError(f"this policy was trained without {name} prompts", field=name, expected="none")
        embeddings = torch.stack([self._embed(text) for text in words]).to(self.device) if words else None
        with torch.no_grad():
            tokens = self._tokens(shown).to(self.device) if shown else None
            return self.network.encode(embeddings, tokens)

    def episodes(
        self, prompts: EncodedPrompts, prompt_of: NDArray[np.int64] | None = None, targets: FloatArray | float = 0.0
    ) -> Episodes:
        """What acts in many episodes at once, of several tasks; see `Episodes`."""
        return Episodes(self.network, self.acting, self.critic, prompts, prompt_of, targets)

    def target_returns(
        self, tasks: Sequence[str | None], demonstrations: Sequence[Demonstrations | None]
    ) -> FloatArray:
        """The target returns of B tasks for a policy conditioned on history, given B tasks' demonstrations.

        See `llmdpd.nn.history_policy.target_returns`.
        """
        # Such a policy takes one demonstration at most.
        first = [None if shown is None else each_demonstration(shown)[0] for shown in demonstrations]
        return target_returns(
            self.metadata.get("target_returns", {}), tasks, first if self.network.reads.trajectory else None
        )

    @in_own_settings
    def attention(
        self, text: str | TextPrompt, trajectory: Demonstration, observations: FloatArray
    ) -> tuple[NDArray[np.float32], FloatArray] | None:
        """Where in its demonstration the policy looks during an episode: observations [L, S] from its start on.

        Returns:
            The waypoint heads' weights f32 [L, heads, T] on the T steps that are read, and those steps' times [T]; None
            of a policy that retrieves no waypoints.

        Raises:
            InputError: as `prompt`.
        """
        context = self.network.context
        if not context.retrieves:
            return None
        prompts = self.encode_prompts([text if self.network.reads.text else None], [trajectory])
        with torch.no_grad():
            state = torch.from_numpy(self.network.spaces.episode(observations)).to(self.device)
            weights = context.weights(state, prompts, torch.arange(len(state), device=self.device))
        return weights[..., :-1].cpu().numpy(), self._tokens([trajectory]).times[0].numpy()

    def reset(self) -> None:
        """Start an episode: the time step goes back to 0, and what is left of a chunk is dropped."""
        self._step = 0
        if self._episodes is not None:
            self._episodes.reset()

    def seed(self, seed: int) -> None:
        """Fix the noise of all actions from here on; what is left of a chunk was sampled before, and is dropped."""
        if self._episodes is not None:
            self._episodes.drop_chunks()
        self._random = torch.Generator().manual_seed(int(seed))  # int(): numpy's integers too

    def act(self, observation: ArrayLike, step: int | None = None, reward: ArrayLike | None = None) -> FloatArray:
        """Observation [S] → action [A], or [B, S] → [B, A], all under the one prompt.

        The time step counts by itself from `reset()`; `step` sets it. Row i is the same episode from call to call. With
        action chunks, an observation is read where a chunk is sampled: after `reset()`, after the last one's
        `action_horizon` actions, and where the time step was set to another step than the next. `reward`, of the last
        action (a number, or [B]), is taken off the return that a policy which is conditioned on history asks for, and
        which stays as it is without; other policies have no use for it.

        Raises:
            InputError: no prompt yet, or an observation of another width, or that is no finite numbers.
        """
        if self._episodes is None:
            raise InputError("the policy has no prompt yet", expected="prompt(text=…, trajectory=…) before act()")
        state = read_observations(observation, self.network.spaces.observed_dim)
        rows = np.atleast_2d(state)
        self._step = self._step if step is None else step
        actions = self._episodes.act(
            np.arange(len(rows)), np.full(len(rows), self._step), rows, read_rewards(reward, len(rows)), self._seeds
        )
        self._step += 1
        return actions[0] if state.ndim == 1 else actions

    def _seeds(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        seeds: NDArray[np.int64] = torch.randint(2**63 - 1, (len(rows),), generator=self._random).numpy()
        return seeds

    def _embed(self, text: str | TextPrompt) -> Tensor:
        rendered = text.render() if isinstance(text, TextPrompt) else text
        key = text_key(rendered)
        if key not in self.texts:
            from llmdpd.prompts import LLMEncoder

            trained = self.metadata.get("llm")
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

    def _tokens(self, prompts: Sequence[Demonstrations]) -> TrajectoryTokens:
        network = self.network
        return read_demonstrations(
            prompts, network.spaces, network.reads.encoder, network.reads_rewards, network.action_scaling
        )


def _check_finite(part: nn.Module | Mapping[str, Tensor] | None) -> None:
    """Raise `InputError` for a number that is not finite: a clipped sample would hide it."""
    check_tensors(part.state_dict() if isinstance(part, nn.Module) else part or {})


class ActionChunks:
    """What is left of the action chunks of many episodes, each with its own time steps.

    An episode executes the first `horizon` actions of a chunk at consecutive time steps, and has the next one sampled
    in the state that it is in then (action chunking: Zhao et al. 2023, ACT, without its temporal ensembling; receding
    horizon: Chi et al. 2023, Diffusion Policy).
    """

    def __init__(self, horizon: int) -> None:
        self._horizon = horizon
        # Of each episode under way the time step at which it goes on, and the actions [n, A] from there on.
        self._left: dict[int, tuple[int, FloatArray]] = {}

    def reset(self) -> None:
        """Drop what is left of every chunk."""
        self._left.clear()

    def due(self, episodes: IntArray, steps: IntArray) -> IntArray:
        """The rows of B episodes [B], at time steps [B], that need a chunk.

        A chunk goes on at the time step after its last action's and at no other: an episode that begins anew, or whose
        time step was set, needs one.
        """
        clocks = zip(episodes.tolist(), steps.tolist(), strict=True)
        return np.array([row for row, (who, step) in enumerate(clocks) if self._step_of(who) != step], np.int64)

    def put(self, episodes: IntArray, steps: IntArray, chunks: FloatArray) -> None:
        """Chunks [B, H, A] of B episodes, from these time steps on."""
        for who, step, chunk in zip(episodes.tolist(), steps.tolist(), chunks, strict=True):
            self._left[who] = step, chunk[: self._horizon]

    def take(self, episodes: IntArray) -> FloatArray:
        """The next action of each of B episodes, [B, A]."""
        return np.stack([self._take(who) for who in episodes.tolist()])

    def _step_of(self, episode: int) -> int | None:
        return self._left[episode][0] if episode in self._left else None

    def _take(self, episode: int) -> FloatArray:
        step, actions = self._left.pop(episode)
        if len(actions) > 1:
            self._left[episode] = step + 1, actions[1:]
        first: FloatArray = actions[0]
        return first


class Episodes:
    """Acts in episodes that are told apart by numbers, each with its own time steps.

    What is sampled for an episode depends on that episode's own past alone, but for rounding, whatever else is in the
    batch.

    Args:
        network: the policy's. acting: how it acts. critic: what chooses among several samples; None for nothing.
        prompts: P of them, encoded.
        prompt_of: [episodes], which prompt each episode is under, by its number; None: all under the one.
        targets: target returns at the beginning, by episode, or one for all; for policies that are
            conditioned on history.
    """

    def __init__(
        self,
        network: PolicyNetwork,
        acting: ActingConfig,
        critic: nn.Module | None,
        prompts: EncodedPrompts,
        prompt_of: IntArray | None = None,
        targets: FloatArray | float = 0.0,
    ) -> None:
        for module in (network, critic):  # they may have been trained since the policy was made
            _check_finite(module)
        self._network, self._acting, self._critic = network, acting, critic
        self._prompts, self._prompt_of, self._targets = prompts, prompt_of, np.asarray(targets, np.float32)
        self._frozen = network.freeze(prompts, acting, critic)
        self._horizon = acting.horizon(network.config)
        self._chunks, self._memory = ActionChunks(self._horizon), network.episode_memory()
        # Of each episode under way the time step after its last observation, and that.
        self._last: dict[int, tuple[int, FloatArray]] = {}

    def reset(self) -> None:
        """Forget every episode."""
        self.drop_chunks()
        self._last.clear()
        if self._memory is not None:
            self._memory.reset()

    def drop_chunks(self) -> None:
        """Sample anew from the next step on."""
        self._chunks.reset()

    def act(
        self,
        episodes: IntArray,
        steps: IntArray,
        observations: FloatArray,
        rewards: FloatArray,
        seeds: Callable[[IntArray], IntArray],
    ) -> FloatArray:
        """The next action of each of B episodes, [B, A], in the environment's own numbers.

        Args:
            episodes: [B], their numbers; no two alike. steps: [B], time step of each within itself.
            observations: [B, S], the present ones. rewards: [B], what came of each one's last action.
            seeds: rows [b] of the B that a chunk is sampled for → seeds [b] of its noise.
        """
        scaling = self._network.action_scaling
        observations = self._completed(episodes, steps, observations)
        if self._horizon == 1:
            chunks = self._sample(episodes, steps, observations, rewards, seeds(np.arange(len(episodes))))
            return scaling.from_unit(chunks[:, 0])
        due = self._chunks.due(episodes, steps)
        if len(due):
            who, when = episodes[due], steps[due]
            chunks = self._sample(who, when, observations[due], rewards[due], seeds(due))
            self._chunks.put(who, when, chunks)
        if not len(episodes):
            return np.empty((0, self._network.action_dim), np.float32)
        return scaling.from_unit(self._chunks.take(episodes))

    def _completed(self, episodes: IntArray, steps: IntArray, observations: FloatArray) -> FloatArray:
        """Observations with what is remembered of the step before, by episode; one that begins anew has none."""
        spaces = self._network.spaces
        if not spaces.remembered:
            return observations
        before = observations.copy()
        for row, (who, step) in enumerate(zip(episodes.tolist(), steps.tolist(), strict=True)):
            due, last = self._last.get(who, (-1, before[row]))
            self._last[who] = step + 1, before[row].copy()
            if due == step:
                before[row] = last
        return spaces.with_remembered(observations, before)

    @in_own_settings
    def _sample(
        self, who: IntArray, steps: IntArray, observations: FloatArray, rewards: FloatArray, seeds: IntArray
    ) -> FloatArray:
        """Chunks [b, H, A] from the present states of these episodes on."""
        if self._frozen is not None:
            prompt_of = None if self._prompt_of is None else self._prompt_of[who]
            frozen = self._frozen.act(observations, steps, prompt_of, seeds)
            return frozen.reshape(len(who), -1, self._network.action_dim)
        place, history = self._network.device, None
        if self._memory is not None:
            targets = self._targets[who] if self._targets.ndim else np.full(len(who), self._targets)
            history = self._memory.recall(who, steps, observations, rewards, targets).to(place)
        index = None if self._prompt_of is None else torch.from_numpy(self._prompt_of[who]).to(place)
        states, times, keys = (torch.from_numpy(part).to(place) for part in (observations, steps, seeds))
        with torch.no_grad():
            sampled = self._network.sample(
                States(states, index, times, history), self._prompts, self._acting, keys, self._critic
            )
        chunks: FloatArray = sampled.cpu().numpy()
        if not np.isfinite(chunks).all():
            expected = "finite numbers: are the weights?"
            raise InputError("NaN or Inf in the action", field="network", expected=expected)
        if self._memory is not None:
            self._memory.note(who, chunks[:, 0])
        return chunks
