"""The command `python -m llmdpd.collect`: make a data set, of scripted experts or of a run of SAC."""

from __future__ import annotations

from llmdpd.cli.common import command
from llmdpd.data.collecting.medium_replay import MediumReplayConfig, collect_sac
from llmdpd.data.collecting.scripted import CollectConfig, Collected, collect_scripted, folder_of, partial_folder
from llmdpd.errors import InputError, StopRequestedError
from llmdpd.tasks.simulation.processes import WorkerError
from llmdpd.training.stopping import StopSignals
from llmdpd.utils.command_line import parse, renamed, take_option
from llmdpd.utils.extras import extra
from llmdpd.utils.progress import ProgressBar, console

with extra("cli"):
    from rich.table import Table


def _summary_table(collected: Collected) -> Table:
    """Tasks in rows; successes by behaviour ("won/episodes") in the last columns."""
    kinds = list(dict.fromkeys(kind for row in collected.summaries for kind in row.successes))
    table = Table(box=None, padding=(0, 2, 0, 0), caption="last columns: successes/episodes by behaviour")
    table.add_column("task", no_wrap=True)
    for name in ("episodes", "steps", "length", *kinds):
        table.add_column(name, justify="right", no_wrap=True)
    for row in collected.summaries:
        counts = [row.successes.get(kind, (0, 0)) for kind in kinds]
        rates = [f"{won}/{of}" for won, of in counts]
        episodes = str(row.episodes) if row.kept == row.episodes else f"{row.kept} of {row.episodes}"
        length = f"{row.mean_length:.0f}"
        table.add_row(row.task, episodes, f"{row.transitions:,}", length, *rates)
    return table


def _dispatch(arguments: list[str]) -> None:
    policy, words = take_option(arguments, "--policy")
    if policy == "sac":
        _collect_sac(parse(MediumReplayConfig, words, "python -m llmdpd.collect --policy sac"))
    elif policy in (None, "scripted"):
        about = (
            f"{CollectConfig.__doc__}\n    --policy sac    all steps of a run of SAC instead (see --policy sac --help)"
        )
        words = renamed(words, {"--tail": "--post-success-steps"})
        _collect(parse(CollectConfig, words, "python -m llmdpd.collect", description=about))
    else:
        raise InputError("unknown policy", field="--policy", found=policy, expected="scripted or sac")


def _collect(config: CollectConfig) -> None:
    with StopSignals() as stop, ProgressBar("collecting", "episodes", check=stop.check) as bar:
        try:
            collected = collect_scripted(config, lambda done, total, steps: bar.update(done, total, f"{steps:,} steps"))
        except (StopRequestedError, WorkerError):
            console.print(f"finished episodes are kept in {partial_folder(folder_of(config))}")
            console.print("run the same command again to continue")
            raise
    console.print(_summary_table(collected))
    data = collected.dataset
    how = "was there already" if collected.reused else f"took {collected.seconds:.1f} s"
    console.print(f"{collected.out}: {data.num_episodes} episodes, {data.num_transitions:,} transitions; {how}")
    console.print(f"content {collected.content}")


def _collect_sac(config: MediumReplayConfig) -> None:
    with StopSignals() as stop, ProgressBar("SAC", "steps", check=stop.check) as bar:
        try:
            collections = collect_sac(
                config, lambda task, done, total, words: bar.update(done, total, f"{task}: {words}")
            )
        except StopRequestedError:
            console.print(f"what was done is kept in {config.out}; run the same command again to continue")
            raise
    for collected in collections:
        data = collected.dataset
        console.print(
            f"{collected.path}: {data.num_episodes} episodes, {data.num_transitions:,} transitions, level "
            f"{collected.level:.1f}" + ("; was there already" if collected.reused else "")
        )
        if not collected.reached:
            console.print(
                f"{collected.task}: the level {config.level:.1f} was not reached; try more --steps, another --out"
            )


main = command(_dispatch)
