"""The language model that a run learns with: its sizes in the configuration, its identity among the run's inputs."""

from __future__ import annotations

import dataclasses
from typing import Any

from llmdpd.config.schema import TrainConfig
from llmdpd.errors import InputError
from llmdpd.methods.lamo.corpus import find_corpus
from llmdpd.methods.lamo.gpt2 import find_language_model
from llmdpd.methods.lamo.method import language_block
from llmdpd.methods.lamo.network import check_peft


def with_language_sizes(config: TrainConfig) -> TrainConfig:
    """The configuration with the sizes of its language model (`lamo.model`), which a policy is built by without it.

    Where the model can't be had the sizes are left as they are: an experiment can be planned without it, and a run
    begins with `check_language`.
    """
    try:
        sizes = find_language_model(config.lamo.model).sizes
    except InputError:
        return config
    return dataclasses.replace(config, policy=dataclasses.replace(config.policy, language=sizes))


def check_language(config: TrainConfig) -> None:
    """What lamo needs is here.

    Raises:
        InputError: model or corpus are not on this machine (naming the command that fetches them), or don't fit; peft
            is not installed; the model has other sizes than the configuration.
    """
    check_peft()
    model = find_language_model(config.lamo.model)
    if model.sizes != config.policy.language:
        raise InputError(
            "the language model has other sizes than the run's",
            path=model.source.folder,
            field="lamo.model",
            found=model.sizes,
            expected=config.policy.language,
        )
    if config.lamo.language_weight:
        language_block(config.lamo, model)
        find_corpus(config.lamo.corpus)


def language_words(config: TrainConfig) -> str:
    """Which language model a run of lamo is made of, and which text it goes on predicting, for a reader."""
    sizes = config.policy.language
    text = config.lamo.corpus if config.lamo.language_weight else "none"
    return f"{config.lamo.model}, {sizes.layers} layers of {sizes.width}; text: {text}"


def language_facts(config: TrainConfig) -> dict[str, Any]:
    """Which language model it is, and SHA-256 of the corpus, None where there is no language loss."""
    source = find_language_model(config.lamo.model).source
    corpus = find_corpus(config.lamo.corpus).sha256() if config.lamo.language_weight else None
    return {"model": source.model_id, "revision": source.revision, "corpus": corpus}
