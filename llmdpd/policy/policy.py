"""`Policy`: a trained policy, prompted with a text and a demonstration; numpy in, numpy out."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from llmdpd.errors import InputError, located
from llmdpd.methods import METHODS
from llmdpd.nn.acting import ActingConfig, BestOfN
from llmdpd.nn.context import ALL_KEPT, EncodedPrompts, Keep
from llmdpd.nn.history_policy import check_targets, target_returns
from llmdpd.nn.policy_network import PolicyNetwork
from llmdpd.nn.spaces import Spaces
from llmdpd.policy.card import UNKNOWN_LICENCE
from llmdpd.policy.contradiction import contradicts
from llmdpd.policy.episodes import Episodes, check_finite
from llmdpd.policy.folder import DESCRIPTION, find_policy, read_policy_folder, text_key, write_policy_folder
from llmdpd.policy.formats import UPGRADES
from llmdpd.policy.graphs import ActingGraphs
from llmdpd.policy.hub import Pushed
from llmdpd.policy.inputs import (
    Demonstration,
    Demonstrations,
    Observations,
    check_keys,
    each_demonstration,
    read_demonstrations,
    read_observations,
    recorded,
)
from llmdpd.policy.publish import push_policy
from llmdpd.policy.session import Seeds, Session
from llmdpd.policy.takeover import Takeover
from llmdpd.policy.tracker import Scene, Track
from llmdpd.prompts import TextPrompt
from llmdpd.prompts.demonstration import TrajectoryTokens, make_tokens, read_part
from llmdpd.prompts.source import LLMIdentity
from llmdpd.utils.bounds import check_config
from llmdpd.utils.device import check_device
from llmdpd.utils.options import CudaGraphMode
from llmdpd.utils.plain import from_plain, to_plain
from llmdpd.utils.settings import in_own_settings
from llmdpd.utils.tensors import check_fit, load_tensors, without_memory

if TYPE_CHECKING:
    from llmdpd.evaluation.results import TaskResult

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
        cuda_graph: whether what acts on a GPU is captured in CUDA graphs; `graphs.mode` sets it anew.

    Raises:
        InputError: a way of acting that is out of bounds, or that the network or its layout does not have; NaN or Inf
            in a weight.
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
        cuda_graph: CudaGraphMode = "auto",
    ) -> None:
        check_config(acting, "acting")
        with located(field="acting"):
            acting.check_network(network.config)
        self.scene = None  # what the tracker reads and writes; None: it never takes over
        if acting.takes_over and network.reads.trajectory:
            low, high = network.action_scaling.parts()[2:].astype(np.float32)
            self.scene = Scene(network.spaces.layout, low, high, "acting.track_after", "set it to 0")
        self.method, self.acting, self.llm = method, acting, llm
        self.network = network.eval().requires_grad_(False)
        self.critic = None if critic is None else critic.eval().requires_grad_(False)
        self.graphs = ActingGraphs(self.network, acting, self.critic, cuda_graph)
        self.texts = dict(texts or {})
        for part in (self.network, self.critic, self.texts):
            check_finite(part)
        self.metadata = dict(metadata or {})
        self._session: Session | None = None
        self.seed(0)

    def __repr__(self) -> str:
        tasks = ", ".join(self.metadata.get("trained_on", ())) or "unknown tasks"
        prompted = "prompted" if self._session is not None else "no prompt yet"
        return (
            f"<Policy of {self.network.spaces.observed_dim} state and {self.network.action_dim} action numbers, "
            f"{self.network.reads.kind} context, trained on {tasks}; {prompted}>"
        )

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.network.device

    @property
    def _keys(self) -> tuple[str, ...]:
        """The keys of Dict observations that it was trained on, in the order in which they are read."""
        return tuple(self.metadata.get("observation", ()))

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
    def load(
        cls,
        source: str | os.PathLike[str],
        device: str = "cpu",
        revision: str | None = None,
        cuda_graph: CudaGraphMode = "auto",
    ) -> Policy:
        """Load from a policy folder, a run folder, or `hub:OWNER/NAME` for one of the Hugging Face hub.

        `revision` is a commit, branch or tag of the latter, which then needs no `hub:`; without one, a warning says
        which commit was loaded. `metadata["hub"]` records it. `cuda_graph` counts on a GPU: see `ActingGraphs`.

        Raises:
            InputError: nothing there, a missing or altered file, another version, weights that are not finite, a device
                that is absent; and as `find_policy`.
        """
        place = check_device(device)
        path, commit = find_policy(source, revision)
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
            known = description["metadata"]
            check_keys(known.get("observation", []), known.get("observation_widths", []))
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
        metadata = description["metadata"] | ({} if commit is None else {"hub": commit._asdict()})
        kept = {"llm": description["llm"], "texts": tensors["texts"], "metadata": metadata, "cuda_graph": cuda_graph}
        with located(path=file):
            return cls(description["method"], network.to(place), critic, acting, **kept)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy folder, whole or not at all; a policy folder that was there is replaced.

        Raises:
            InputError: the folder holds other files, as a run's does.
        """
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

    def push_to_hub(
        self,
        target: str,
        folder: str | os.PathLike[str] | None = None,
        *,
        results: Sequence[TaskResult] = (),
        prompts: Mapping[str, str] | None = None,
        license: str = UNKNOWN_LICENCE,
        private: bool = True,
    ) -> Pushed:
        """Push the policy, with a model card, to a repository of the Hugging Face hub; a run's with all that is known
        of it by `llmdpd.runs.push.push_run`.

        Without a token, offline, or where `target` is a folder, what would be pushed is written only; `Pushed` says so.

        Args:
            target: OWNER/NAME, or a folder, which begins with ".", "/" or "~".
            folder: from which it is pushed, written anew; by default hub/OWNER/NAME below the working directory.
            results: for the card, of this policy (`llmdpd.evaluation.results.read_results`).
            prompts: for the card, text prompts by task.
            license: of the weights, as the hub abbreviates it, such as "mit".
            private: whether a repository that is made is its owner's alone; one that is there stays what it is.

        Raises:
            InputError: no such id, a folder that holds something else, or the hub refuses.
        """
        given: dict[str, Any] = {"results": results, "prompts": prompts, "licence": license, "private": private}
        return push_policy(self, target, folder, **given)

    def with_acting(self, **changes: Any) -> Policy:
        """The same policy acting in another way: fields of its `ActingConfig`.

        Raises:
            InputError: a field that it does not have, or a value that does not fit it.
        """
        changed = self.acting.changed(**changes)
        if self.critic is None and isinstance(changed, BestOfN) and changed.samples > 1:
            problem, hint = "no critic to choose among samples by", "this policy was trained by cloning alone"
            raise InputError(problem, field="acting.samples", found=changed.samples, expected="1", hint=hint)
        return self._acting_by(changed)

    def heeding_texts(self) -> Policy:
        """The same policy with every text kept and without the tracker: where a text is to say something else than the
        demonstration beside it.
        """
        return self._acting_by(self.acting.heeding_texts())

    def _acting_by(self, acting: ActingConfig) -> Policy:
        kept: dict[str, Any] = {"llm": self.llm, "texts": self.texts, "metadata": self.metadata}
        return Policy(self.method, self.network, self.critic, acting, **kept, cuda_graph=self.graphs.mode)

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

        A policy with `acting.track_after` hands over to a rule that tracks the demonstration where it stands still, or
        after so many times its length.

        `target_return` is what a policy asks for that is conditioned on history; by default what its demonstration has
        earned, or where it reads none the mean over the tasks that it was trained on. Other policies have no use for
        it. Weights count as they are here: after training on, prompt again. The LLM is loaded only for a text that
        neither the policy nor the embedding cache knows.

        Returns:
            The policy itself.

        Raises:
            InputError: a prompt that the policy needs and doesn't get, or gets and was not trained with; a
                demonstration of the wrong width or too long; more of them than 16, or several for a policy that takes
                one; a text model of another width than the one in training.
        """
        self._session = self.session(text, trajectory, target_return)
        self._session.use(self._seeds)
        return self

    def _prompted(
        self, text: str | TextPrompt | None, trajectory: Demonstrations | None, target_return: float | None
    ) -> Episodes:
        if target_return is not None and not np.isfinite(target_return):
            found = target_return
            raise InputError("wrong return", field="target_return", found=found, expected="a finite number")
        reads = self.network.reads
        if text is None and trajectory is None and target_return is None and (reads.text or reads.trajectory):
            kinds = [name for name, read in (("text", reads.text), ("trajectory", reads.trajectory)) if read]
            raise InputError("an empty prompt", field=kinds[-1], found="nothing", expected=" or ".join(kinds))
        prompts = self.encode_prompts([text], [trajectory])
        if self.network.memory_length and target_return is None:
            target_return = float(self.target_returns([None], [trajectory])[0])
        return self.episodes(prompts, targets=target_return or 0.0, shown=[trajectory])

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
            keep = ALL_KEPT
            if self.acting.drops_texts and embeddings is not None and shown:
                keep = Keep(text=self._heeded(embeddings, shown))
            return self.network.encode(embeddings, tokens, keep)

    def _heeded(self, embeddings: Tensor, prompts: Sequence[Demonstrations]) -> Tensor:
        """1 for each of P texts, 0 where it contradicts its demonstrations, float [P, 1]."""
        network, kept = self.network, torch.ones(len(prompts), 1, device=self.device)
        if not network.reads.text_dropout:
            return kept  # it never learned to do without
        encoder, layout = network.reads.encoder, network.spaces.layout
        for number, prompt in enumerate(prompts):
            own = [
                recorded(one, network.spaces, network.action_scaling, self._keys, quiet=True)
                for one in each_demonstration(prompt)
            ]
            tokens = make_tokens(own, encoder, layout=layout, counts=(len(own),), standing=False).to(self.device)
            given, alone = (network.encode(text, tokens) for text in (embeddings[number : number + 1], None))
            shown = [read_part(one, encoder, layout, standing=False)[0] for one in own]
            kept[number] = not contradicts(network, given, alone, shown)
        if (dropped := int((kept == 0).sum())) > 0:
            _log.info("texts that contradict their demonstrations are left out of %d of %d prompts", dropped, len(kept))
        return kept

    @in_own_settings
    def episodes(
        self,
        prompts: EncodedPrompts,
        prompt_of: NDArray[np.int64] | None = None,
        targets: FloatArray | float = 0.0,
        shown: Sequence[Demonstrations | None] = (),
    ) -> Episodes:
        """What acts in many episodes at once, of several tasks; see `Episodes`.

        `shown`: each prompt's demonstrations, or None, for a policy that hands over to their tracker; without any it
        does not.

        Raises:
            InputError: as `Episodes`; demonstrations of another number of prompts.
        """
        if shown and len(shown) != len(prompts) and prompt_of is not None:
            expected = f"{len(prompts)}, as prompts"
            raise InputError("wrong number of demonstrations", field="shown", found=len(shown), expected=expected)
        takeover = self._takeover(shown, prompt_of)
        self.graphs = self.graphs.of(self.network, self.acting, self.critic)  # which may have been replaced
        return Episodes(self.network, self.acting, self.critic, prompts, prompt_of, targets, takeover, self.graphs)

    def _takeover(self, shown: Sequence[Demonstrations | None], prompt_of: IntArray | None) -> Takeover | None:
        """What takes over from the policy under these prompts; None where nothing does."""
        scene = self.scene
        if scene is None or not any(demonstrations is not None for demonstrations in shown):
            return None
        tracks = [[] if demonstrations is None else self.tracks(demonstrations, scene) for demonstrations in shown]
        return Takeover(tracks, scene, self.acting.takes_over, prompt_of)

    def tracks(self, demonstrations: Demonstrations, scene: Scene) -> list[Track]:
        """What the tracker follows of a prompt's demonstrations: of each the part that the policy reads.

        Raises:
            InputError: as `prompt`.
        """
        spaces, scaling, encoder = self.network.spaces, self.network.action_scaling, self.network.reads.encoder
        given = [recorded(one, spaces, scaling, self._keys, quiet=True) for one in each_demonstration(demonstrations)]
        parts = [read_part(one, encoder, spaces.layout, standing=False)[0] for one in given]
        return [Track.of(part.observations, scaling.from_unit(part.actions), scene) for part in parts]

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
        self, text: str | TextPrompt, trajectory: Demonstration, observations: Observations
    ) -> tuple[NDArray[np.float32], FloatArray] | None:
        """Where in its demonstration the policy looks during an episode: observations [L, S] from its start on.

        Returns:
            The waypoint heads' weights f32 [L, heads, T] on the T steps that are read, and those steps' times [T]; None
            of a policy that retrieves no waypoints.

        Raises:
            InputError: as `prompt`, and observations as for `act`.
        """
        context = self.network.context
        if not context.retrieves:
            return None
        given = read_observations(observations, self.network.spaces.observed_dim, self._keys)
        seen = self.network.spaces.episode(np.atleast_2d(given))
        prompts = self.encode_prompts([text if self.network.reads.text else None], [trajectory])
        with torch.no_grad():
            state = torch.from_numpy(seen).to(self.device)
            weights = context.weights(state, prompts, torch.arange(len(state), device=self.device))
        return weights[..., :-1].cpu().numpy(), self._tokens([trajectory]).times[0].numpy()

    def session(
        self,
        text: str | TextPrompt | None = None,
        trajectory: Demonstrations | None = None,
        target_return: float | None = None,
        seed: int = 0,
    ) -> Session:
        """One more user of the policy: with a prompt, time steps and noise of its own; arguments as in `prompt`.

        Sessions share nothing that changes: each may act in a thread of its own, or in another environment. Those of
        one seed have the same noise.

        Raises:
            InputError: as `prompt`.
        """
        episodes = self._prompted(text, trajectory, target_return)
        return Session(episodes, self.network.spaces.observed_dim, seed, self._keys)

    def reset(self, rows: ArrayLike | None = None) -> None:
        """Start an episode, see `Session.reset`; before `prompt` there is nothing to do."""
        if self._session is not None:
            self._session.reset(rows)

    @property
    def tracked(self) -> NDArray[np.bool_]:
        """In which rows [B] the tracker acts in place of the policy, see `Session.tracked`; before `prompt` none."""
        return np.zeros(1, np.bool_) if self._session is None else self._session.tracked

    def seed(self, seed: int) -> None:
        """Fix the noise of all actions from here on, see `Session.seed`."""
        self._seeds = Seeds(seed)
        if self._session is not None:
            self._session.use(self._seeds)

    def act(
        self, observation: Observations, step: ArrayLike | None = None, reward: ArrayLike | None = None
    ) -> FloatArray:
        """Observation [S] → action [A], or [B, S] → [B, A], all under the one prompt; see `Session.act`.

        Raises:
            InputError: no prompt yet; as `Session.act`.
        """
        if self._session is None:
            raise InputError("the policy has no prompt yet", expected="prompt(text=…, trajectory=…) before act()")
        return self._session.act(observation, step, reward)

    def _embed(self, text: str | TextPrompt) -> Tensor:
        rendered = text.render() if isinstance(text, TextPrompt) else text
        if not isinstance(rendered, str):
            hint = "the demonstration is the second argument, trajectory"
            raise InputError("this is no text", field="text", found=f"a {type(text).__name__}", hint=hint)
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
            prompts, network.spaces, network.reads.encoder, network.reads_rewards, network.action_scaling, self._keys
        )
