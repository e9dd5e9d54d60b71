"""The experiments as values: which methods they compare, with which figures of the paper. A new method is one line."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmdpd.experiments.cell import DATA, UNSEEN, Evaluation
from llmdpd.reporting.paper import TABLE_1, TABLE_2, TABLE_3, PaperTable


@dataclass(frozen=True)
class Variant:
    """Another evaluation of a method's policy: with other prompts, or of a non-learned baseline in its place.

    options   of llmdpd.evaluate
    once      the same for every seed of training, so done for the first one alone
    """

    label: str
    evaluation: Evaluation
    once: bool = False


@dataclass(frozen=True)
class Compared:
    """A preset and options of llmdpd.train: one run a seed. Methods with the same label are one row of the table.

    key       of the run's folder, KEY-seedN; methods that several experiments share have the same
    reported  the paper's name of the column that this method is held against
    fixed     fields that the method stands for beside those of its options
    """

    key: str
    label: str
    preset: str
    options: tuple[str, ...] = ()
    reported: str | None = None
    variants: tuple[Variant, ...] = ()
    fixed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grid:
    """An experiment.

    protocols  that it can be run with; the first is the default
    others     columns of the paper without a counterpart here, shown for comparison
    episodes   a task, where neither --episodes nor the budget says otherwise
    """

    title: str
    about: str
    methods: tuple[Compared, ...]
    protocols: tuple[str, ...] = ("paper", "ml45", "design")
    paper: PaperTable | None = None
    others: tuple[str, ...] = ()
    episodes: int = 500


@dataclass(frozen=True)
class Budget:
    """The most of each that a run may take; None: as the preset (or the grid) says."""

    iterations: int | None = None
    data_episodes: int | None = None
    episodes: int | None = None

    def __str__(self) -> str:
        names = ("iterations", "collected episodes a task", "evaluated ones")
        limits = zip((self.iterations, self.data_episodes, self.episodes), names, strict=True)
        return ", ".join(f"{most:,} {name}" for most, name in limits if most is not None) or "as the presets say"


BUDGETS: dict[str, Budget] = {
    "full": Budget(),
    "hour": Budget(iterations=5000, data_episodes=100, episodes=100),
    "minutes": Budget(iterations=1000, data_episodes=40, episodes=25),
    "smoke": Budget(iterations=20, data_episodes=5, episodes=1),
}


# On the tasks that were trained on, the policy may have memorised what its prompts say.
_HELD_OUT = ("--tasks", UNSEEN)


def _prompts(name: str, label: str, *options: str) -> Variant:
    return Variant(label, Evaluation(name, (*_HELD_OUT, "--checkpoint", "last", *options)))


def _non_learned(name: str, label: str) -> Variant:
    return Variant(f"not learned: {label}", Evaluation(name, (*_HELD_OUT, "--baseline", name)), once=True)


_SWAPPED = _prompts("swapped", "another task's prompts", "--prompts", "swapped")
_NO_TRAJECTORY = _prompts("no-trajectory", "text alone", "--prompts", "no-trajectory")
_NO_TEXT = _prompts("no-text", "demonstration alone", "--prompts", "no-text")
_REPLAY = _non_learned("replay", "the demonstration replayed")
_TRACKER = _non_learned("tracker", "the demonstration tracked")
_ALONE = _prompts("alone", "the network alone: never handed over to the tracker", "--track-after", "0")
_REFERENCES = (_ALONE, _SWAPPED, _REPLAY, _TRACKER)

_FULL = Compared("full", "LLMDPD, this project's default", "metaworld", reported="LLMDPD")
_COMPARED = replace(_FULL, variants=_REFERENCES)
_PAPERS = "as in the paper (pooled)"
_POOLED = ("method.network.context.kind",)
_FAITHFUL = Compared(
    "faithful", f"LLMDPD {_PAPERS}", "metaworld-paper", reported="LLMDPD", variants=(_SWAPPED,), fixed=_POOLED
)
_FAITHFUL_ABLATIONS = tuple(
    Compared(
        f"faithful-{name}", f"LLMDPD {_PAPERS}, {column}", f"metaworld-paper-{name}", reported=column, fixed=_POOLED
    )
    for name, column in (("no-prompts", "w/o prompts"), ("no-text", "w/o z_text"), ("no-trajectory", "w/o z_traj"))
)
_CONTEXT = "--method.network.context"
_WITHOUT_TEXT, _WITHOUT_TRAJECTORY = f"{_CONTEXT}.no-text", f"{_CONTEXT}.no-trajectory"
_NO_PROMPTS = Compared("no-prompts", "w/o prompts", "metaworld", (_WITHOUT_TEXT, _WITHOUT_TRAJECTORY), "w/o prompts")
_NO_DIFFUSION = "w/o policy diffusion"
_NO_Z_TEXT = Compared("no-text", "w/o z_text", "metaworld", (_WITHOUT_TEXT,), "w/o z_text")
_NO_Z_TRAJ = Compared("no-trajectory", "w/o z_traj", "metaworld", (_WITHOUT_TRAJECTORY,), "w/o z_traj")

# The default is trained on demonstrations by the first six; cut, overrun and jerky are demonstrators new to it.
_BEHAVIOURS = ("clean", "gaussian", "bursts", "slow", "pauses", "detour", "cut", "overrun", "jerky")
_NO_ROTATION = ("--method.augmentation.rotate", "0", "--method.augmentation.mirror", "0")
_NO_TIMESTEP = (f"{_CONTEXT}.retrieval.no-timestep-embedding",)
_NO_OFFSET = ("--method.augmentation.offset", "0")
_THREE_DEMONSTRATORS = "clean:0.5,gaussian:0.3,bursts:0.2"
_FULL_NOISE = _prompts("full-noise", "acting noise not scaled", "--noise-scale", "1")
_OTHER_PROMPTS = (_NO_TRAJECTORY, _NO_TEXT, _FULL_NOISE)
_NO_DROPOUT = (f"{_CONTEXT}.text-dropout", "0", f"{_CONTEXT}.trajectory-dropout", "0")
# Half of the data is near-random and often fails, and no episode is left out.
_MIXED = ("--data.noise", "clean:0.25,gaussian:0.15,bursts:0.1,random:0.5", "--data.keep-failed")

# Values converge within some thousands of iterations: a shorter horizon, faster target networks.
_FAST_CRITICS = ("--method.gamma", "0.95", "--method.tau", "0.02")


def _ablation(key: str, label: str, *options: str) -> Compared:
    return Compared(key, label, "metaworld", options)


def _reward(key: str, label: str, *options: str) -> Compared:
    return Compared(key, label, "metaworld", (*_MIXED, "--method.clone", "executed", *options))


def _baseline(method: str, label: str, reported: str | None = None) -> Compared:
    return Compared(method, label, "metaworld", ("--method", method), reported)


def _shares(method: str, label: str) -> tuple[Compared, ...]:
    """The baseline on 1 %, 10 % and all of the episodes."""
    little = ((1, "0.01"), (10, "0.1"))
    options = ("--method", method, "--data.fraction")
    return (
        *(Compared(f"{method}-{n}", f"{label}, {n} %", "metaworld", (*options, share)) for n, share in little),
        _baseline(method, label),
    )


def _prompted_by(behaviour: str) -> Variant:
    return _prompts(behaviour, f"demonstrations: {behaviour}", "--prompt-behaviours", behaviour, "--data-root", DATA)


def _locomotion(label: str, key: str, *options: str, reported: str | None = None) -> tuple[Compared, ...]:
    environments = ("halfcheetah", "hopper", "walker2d")
    return tuple(Compared(f"{key}{name}", label, f"d4rl-{name}", options, reported or label) for name in environments)


def _other(method: str, label: str, reported: str) -> tuple[Compared, ...]:
    return _locomotion(label, f"{method}-", "--method", method, reported=reported)


# As `llmdpd.tasks.metaworld.suite` has them.
_FOLDS = tuple(
    Compared(f"fold-{k}", _FULL.label, "metaworld", ("--protocol", f"fold-{k}"), variants=(_ALONE, _REPLAY, _TRACKER))
    for k in range(10)
)

GRIDS: dict[str, Grid] = {
    "table1": Grid(
        "Table 1: seen tasks and zero-shot tasks",
        "Success on the tasks that were trained on and on tasks that were never seen, each given by a text and one "
        "demonstration.",
        (_COMPARED, _FAITHFUL),
        paper=TABLE_1,
        others=("SAC", "S4RL", "RAD", "MTDIFF"),
    ),
    "table2": Grid(
        "Table 2: locomotion on medium-replay data",
        "Normalised score; Diffusion-QL is the same run without prompts. What is reconstructed is known from "
        "abstracts and citations alone, and the rest of it is this project's own.",
        (
            *_locomotion("LLMDPD", ""),
            *_locomotion("Diffusion-QL", "diffusion-ql-", _WITHOUT_TEXT, _WITHOUT_TRAJECTORY),
            *_other("ads", "MCQ+ADS, split at random", "ADS"),
            *_other("rd", "RD, reconstructed", "RD"),
            *_other("otto", "OTTO, reconstructed", "OTTO"),
            *_other("pnf", "PnF-Qgrad, reconstructed", "PnF-Qgrad"),
        ),
        protocols=("d4rl",),
        paper=TABLE_2,
        others=("SAORL",),
        episodes=100,
    ),
    "table3": Grid(
        "Table 3: what is left out",
        "The default and the paper's ablations of it: another LLM, without either prompt, without policy diffusion; "
        "and the paper's own method (pooled context) with and without its prompts.",
        (
            _COMPARED,
            Compared("olmo-1b", "OLMo-1B", "metaworld", ("--llm", "olmo-1b"), "OLMo-1B"),
            _NO_PROMPTS,
            _NO_Z_TEXT,
            _NO_Z_TRAJ,
            Compared("trajectory-diffusion", _NO_DIFFUSION, "metaworld-trajectory-diffusion", reported=_NO_DIFFUSION),
            _FAITHFUL,
            *_FAITHFUL_ABLATIONS,
        ),
        paper=TABLE_3,
    ),
    "figure2": Grid(
        "Figure 2: with and without prompts",
        "The default and the same without any prompt. The paper gives its figure's numbers in tables 1 and 3.",
        (_FULL, _NO_PROMPTS),
        paper={**TABLE_1, **TABLE_3},
    ),
    "baselines": Grid(
        "The systems that it is compared with",
        "Other methods on the same data, features, environments and episodes, without prompts but for prompt-dt and "
        "mtdiff, with their published settings where they have such: docs/guides/baselines.md. Cloning learns the "
        "expert's labels of the visited states as the default does, the others the executed actions. SAC has no data: "
        "it learns in the environments themselves, an iteration a step there, and is no offline result.",
        (
            _FULL,
            _baseline("bc", "Cloning, Gaussian"),
            _baseline("diffusion-bc", "Cloning, diffusion"),
            _baseline("diffusion-ql", "Diffusion-QL"),
            _baseline("td3-bc", "TD3+BC"),
            _baseline("rad", "TD3+BC under RAD", "RAD"),
            _baseline("s4rl", "TD3+BC under S4RL", "S4RL"),
            _baseline("cql", "CQL(H)"),
            _baseline("dt", "Decision Transformer"),
            _baseline("prompt-dt", "Prompt Decision Transformer"),
            _baseline("mtdiff", "MTDiff-p", "MTDIFF"),
            _baseline("lamo", "LaMo"),
            _baseline("sac", "SAC, online", "SAC"),
        ),
        paper=TABLE_1,
    ),
    "low-data": Grid(
        "From little data: Decision Transformers with and without a language model",
        "Each learns from a share of every task's episodes, at least one of each; the smaller shares are part of the "
        "greater ones. LaMo's own runs are of locomotion, from 0.1 % on.",
        (*_shares("dt", "Decision Transformer"), *_shares("lamo", "LaMo")),
    ),
    "generalisation": Grid(
        "What makes the context generalise",
        "Each part of the retrieval context left out, and the default's policy with other prompts.",
        (
            replace(_FULL, variants=(*_REFERENCES, *_OTHER_PROMPTS, *map(_prompted_by, _BEHAVIOURS))),
            _ablation("pooled", "pooled", f"{_CONTEXT}.kind", "pooled"),
            _ablation("no-attention", "w/o attention", f"{_CONTEXT}.retrieval.no-attention"),
            _ablation("no-waypoints", "w/o retrieved waypoints", f"{_CONTEXT}.retrieval.no-waypoints"),
            _ablation(
                "no-geometric-similarity", "w/o geometric similarity", f"{_CONTEXT}.retrieval.no-geometric-similarity"
            ),
            _ablation("no-timestep-embedding", "w/o timestep embedding", *_NO_TIMESTEP),
            _ablation("no-offset", "w/o position jitter", *_NO_OFFSET),
            _ablation(
                "no-timestep-embedding-no-offset",
                "w/o timestep embedding and position jitter",
                *(*_NO_TIMESTEP, *_NO_OFFSET),
            ),
            _ablation(
                "few-post-success-steps",
                "5 post-success steps, data and demonstrations",
                *("--data.post-success-steps", "5"),
            ),
            _ablation("no-dropout", "w/o prompt dropout", *_NO_DROPOUT),
            _ablation("not-self-prompted", "w/o prompts over themselves", "--method.self-prompted", "0"),
            _ablation("no-rotation", "w/o rotation and mirroring", *_NO_ROTATION),
            _ablation("three-demonstrators", "three demonstrators in training", "--data.noise", _THREE_DEMONSTRATORS),
            _ablation("absolute", "absolute positions too", *_NO_ROTATION, f"{_CONTEXT}.features", "metaworld"),
            _ablation("steps-16", "16 steps of the demonstration", f"{_CONTEXT}.encoder.steps", "16"),
            _ablation("steps-50", "50 steps of the demonstration", f"{_CONTEXT}.encoder.steps", "50"),
            _ablation("wide", "noise network of 512", "--method.network.hidden-dim", "512"),
            _ablation("short", "5,000 iterations", "--training.iterations", "5000"),
            _ablation("chunk-4", "chunks of 4 actions", "--method.network.chunk", "4"),
            _ablation("executed", "cloning executed actions", "--method.clone", "executed"),
            _ablation("prompts-40", "40 prompts of 12 states a batch", "--method.prompts-per-batch", "40"),
            _ablation("one-prompt", "one prompt a batch", "--method.prompts-per-batch", "1"),
            _NO_PROMPTS,
            _NO_Z_TEXT,
            _NO_Z_TRAJ,
        ),
        protocols=("design", "ml45", "paper"),
    ),
    "folds": Grid(
        "Each of Meta-World's 50 tasks held out once",
        "Ten trainings on 45 tasks, beside the non-learned baselines on the five that each holds out.",
        _FOLDS,
        protocols=("folds",),
        episodes=100,
    ),
    "reward": Grid(
        "What the reward term adds on data of mixed quality",
        "Half of the data near-random, failed episodes kept, the executed actions cloned; with and without the Q term.",
        (
            _reward("mixed-cloning", "cloning alone", "--method.eta", "0"),
            _reward("mixed-eta-0.05", "η = 0.05", "--method.eta", "0.05"),
            _reward("mixed-eta-0.2", "η = 0.2", "--method.eta", "0.2"),
            _reward("mixed-eta-1", "η = 1", "--method.eta", "1"),
            _reward("mixed-fast-eta-0.2", "η = 0.2, γ = 0.95, τ = 0.02", "--method.eta", "0.2", *_FAST_CRITICS),
            _reward("mixed-fast-eta-1", "η = 1, γ = 0.95, τ = 0.02", "--method.eta", "1", *_FAST_CRITICS),
            _reward("mixed-q-sa-0.05", "η = 0.05, Q(s, a)", "--method.eta", "0.05", "--method.no-critic-sees-prompts"),
            _reward("mixed-q-sa-1", "η = 1, Q(s, a)", "--method.eta", "1", "--method.no-critic-sees-prompts"),
        ),
    ),
}
FORMER_KEYS = {
    "no-likeness": "no-geometric-similarity",
    "no-clock": "no-timestep-embedding",
    "no-clock-no-offset": "no-timestep-embedding-no-offset",
    "short-tail": "few-post-success-steps",
    "no-turn": "no-rotation",
    "three-makers": "three-demonstrators",
}
"""Keys that methods had, and those that they have now."""
