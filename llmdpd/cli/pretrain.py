"""The command `python -m llmdpd.pretrain`: a small GPT-2 from a text, for `llmdpd.train --method lamo`."""

from __future__ import annotations

import shlex

import torch

from llmdpd.cli.common import command
from llmdpd.methods.lamo.pretraining import PretrainConfig, pretrain_gpt2
from llmdpd.training.stopping import StopSignals
from llmdpd.utils.command_line import parse
from llmdpd.utils.cores import usable_cores
from llmdpd.utils.progress import ProgressBar, console


def _pretrain(words: list[str]) -> None:
    config = parse(PretrainConfig, words, "python -m llmdpd.pretrain")
    # Unlike a policy's, these matrix products are large enough to be shared out among torch's threads.
    torch.set_num_threads(usable_cores())
    with StopSignals() as stop, ProgressBar("pre-training", "it", check=stop.check) as bar:
        made = pretrain_gpt2(config, bar.update)
    console.print(
        f"{made.folder}: a GPT-2 of {made.parameters:,} parameters and a vocabulary of {made.vocabulary:,}, learned "
        f"from {made.tokens:,} tokens"
    )
    console.print(f"loss on text that was held out: {made.loss_before:.2f} before, {made.loss:.2f} nats a token after")
    options = shlex.join(["--method.model", str(made.folder), "--method.corpus", config.corpus])
    console.print(f"train with it: python -m llmdpd.train --method lamo {options}")


main = command(_pretrain)
