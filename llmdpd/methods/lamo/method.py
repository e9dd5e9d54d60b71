"""LaMo: cloning by a language model with low-rank adapters, which goes on predicting text (Shi et al. 2024)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from llmdpd.errors import InputError
from llmdpd.methods.base import Method, Start, UnaveragedConfig
from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.decision_transformer import cloning_loss
from llmdpd.methods.lamo.backbone import check_peft
from llmdpd.methods.lamo.corpus import find_corpus, read_tokens
from llmdpd.methods.lamo.language_model import LanguageModel, Words, find_language_model, load_language_model
from llmdpd.methods.lamo.network import LaMoNetworkConfig, LanguageDecisionTransformer
from llmdpd.nn.acting import ActingConfig
from llmdpd.utils import sharding
from llmdpd.utils.bounds import Bounds, Count, NonNegative, WholeNumber

_LONGEST_BLOCK = 1024


@dataclass(frozen=True)
class LaMoConfig(UnaveragedConfig):
    """Learning of LaMo: its published settings for continuous control."""

    name = "lamo"
    legacy: ClassVar[Mapping[str, str]] = {"lamo": "method."}

    network: LaMoNetworkConfig = field(default_factory=LaMoNetworkConfig)
    acting: ActingConfig = field(default_factory=ActingConfig)
    batch_size: Count = 64
    """Windows an iteration."""
    prompts_per_batch: Count = 8
    """Tasks in a batch, each with its own share of the windows."""
    model: str = "gpt2"
    """Language model, a GPT-2 or a Llama: smollm2-135m, a hub id, or a local folder."""
    corpus: str = "Salesforce/wikitext:wikitext-103-raw-v1"
    """What the language loss is taken on: a file or folder of text, or REPOSITORY:FOLDER of a data set on the hub."""
    language_weight: NonNegative = 0.1
    """Weight of the language loss; 0: there is none, and no corpus is needed."""
    language_batch: Count = 2
    """Blocks of text an iteration."""
    language_block: Annotated[int | None, Bounds(2)] = None
    """Tokens of a block; by default as many as the language model has positions for, at most GPT-2's 1024."""
    lr: NonNegative = 1e-4
    """Learning rate of embeddings and head."""
    lm_lr: NonNegative = 1e-4
    """Learning rate of the adapters."""
    lr_warmup: WholeNumber = 2500
    """Iterations of linear warm-up, of every rate."""
    weight_decay: NonNegative = 1e-5
    """Decoupled weight decay (AdamW)."""
    grad_clip: NonNegative = 0.25
    """Bound on the norm of the gradient, of both losses together."""

    @classmethod
    def from_preset(cls, start: Start) -> LaMoConfig:
        network = start.diffusion.network
        return cls(network=LaMoNetworkConfig(network.action_bound, network.context.features))

    def resolved(self) -> LaMoConfig:
        """With absolute paths, and the sizes of the language model, which a policy is built by without it.

        Where the model can't be had the sizes are left as they are: an experiment can be planned without it, and a run
        begins with `require`.
        """
        model, corpus = (
            os.path.abspath(os.path.expanduser(place)) if place and Path(place).expanduser().exists() else place
            for place in (self.model, self.corpus)
        )
        network = self.network
        with suppress(InputError):
            network = dataclasses.replace(network, language=find_language_model(model).sizes)
        return dataclasses.replace(self, model=model, corpus=corpus, network=network)

    def require(self) -> None:
        """What the method needs is here.

        Raises:
            InputError: model or corpus are not on this machine (naming the command that fetches them), or don't fit;
                peft is not installed; the model has other sizes than the configuration.
        """
        check_peft()
        model = find_language_model(self.model)
        if model.sizes != self.network.language:
            problem, expected = "the language model has other sizes than the run's", self.network.language
            path = model.source.folder
            raise InputError(problem, path=path, field="method.model", found=model.sizes, expected=expected)
        if self.language_weight:
            language_block(self, model)
            find_corpus(self.corpus)

    def details(self) -> dict[str, str]:
        sizes, text = self.network.language, self.corpus if self.language_weight else "none"
        return {"language model": f"{self.model}, {sizes.layers} layers of {sizes.width}; text: {text}"}

    def inputs(self) -> dict[str, Any]:
        """Which language model it is, and SHA-256 of the corpus, None where there is no language loss."""
        source = find_language_model(self.model).source
        corpus = find_corpus(self.corpus).sha256() if self.language_weight else None
        return {"language_model": {"model": source.model_id, "revision": source.revision, "corpus": corpus}}


@dataclass(frozen=True)
class Text:
    """What the language loss is taken on, all of it where the policy is.

    words: of the language model. tokens: int32 [N], the corpus. block: tokens of a block.
    """

    words: Words
    tokens: Tensor
    block: int

    def draw(self, count: int) -> Tensor:
        """Blocks from anywhere in the corpus, int64 [count, block], by torch's generator of the device."""
        device = self.tokens.device
        starts = torch.randint(len(self.tokens) - self.block + 1, (count, 1), device=device)
        return self.tokens[starts + torch.arange(self.block, device=device)].long()


def load_language(config: LaMoConfig, policy: LanguageDecisionTransformer) -> Text | None:
    """Load the language model's layers into the policy; its words and the corpus, where there is a language loss.

    Raises:
        InputError: a language model or a corpus that is not there or does not fit, or is shorter than a block.
    """
    model = find_language_model(config.model)
    blocks, words = load_language_model(model)
    policy.model.load_blocks(blocks, model.source.folder)
    if config.language_weight == 0:
        return None
    corpus = find_corpus(config.corpus)
    tokens, block = read_tokens(corpus, model), language_block(config, model)
    highest, known = int(tokens.max()), len(words.tokens)
    if highest >= known:
        problem, path = "the tokenizer has more words than the language model", model.source.folder
        found, expected = f"token {highest}", f"below {known}"
        raise InputError(problem, path=path, field="method.model", found=found, expected=expected)
    if len(tokens) < block:
        problem, path = "the corpus is shorter than a block", corpus.files[0]
        found, expected = f"{len(tokens)} tokens", f"at least {block} (method.language_block)"
        raise InputError(problem, path=path, field="method.corpus", found=found, expected=expected)
    device = policy.device
    positions = None if words.positions is None else words.positions.to(device)
    return Text(Words(words.tokens.to(device), positions), tokens.to(device), block)


def language_block(config: LaMoConfig, model: LanguageModel) -> int:
    """Tokens of a block.

    Raises:
        InputError: more than the language model has positions for.
    """
    block = min(model.positions, _LONGEST_BLOCK) if config.language_block is None else config.language_block
    if block > model.positions:
        problem, expected = (
            "the language model has fewer positions than a block has tokens",
            f"at most {model.positions}",
        )
        path, field = model.source.folder, "method.language_block"
        raise InputError(problem, path=path, field=field, found=block, expected=expected)
    return block


class LaMo(Method[LanguageDecisionTransformer, LaMoConfig]):
    """Regression of the executed actions, and prediction of text by the same layers.

    Raises:
        InputError: a language model or a corpus that is not there, or does not fit.
    """

    Config = LaMoConfig
    network_class = LanguageDecisionTransformer

    def __init__(self, network: LanguageDecisionTransformer, config: LaMoConfig, iterations: int) -> None:
        self.text = load_language(config, network)
        super().__init__(network, config, iterations)
        # The language model's own weights are read again from its folder: no checkpoint need hold them.
        self.modules.update(policy=network.learned(), ema_policy=self.ema_policy.learned())

    def _copy(self, network: LanguageDecisionTransformer) -> LanguageDecisionTransformer:
        return network.sharing_copy()

    def _optimise_policy(self) -> None:
        learned, config = self.policy.learned(), self.config
        self._optimise("policy", learned.others(), config.lr, config.weight_decay)
        self._optimise("adapters", list(learned.adapters), config.lm_lr, config.weight_decay)

    def learn(self, batch: PromptedBatch) -> dict[str, Tensor]:
        """One gradient step down both losses."""
        self.policy.train()
        cloning = cloning_loss(self.policy, batch)
        metrics, loss = {"loss/cloning": cloning.detach()}, cloning
        if self.text is not None:
            with sharding.alike():  # each process learns all blocks, which are few
                language = self.language_loss(self.text.draw(self.config.language_batch))
            metrics["loss/language"] = language.detach()
            loss = cloning + self.config.language_weight * language
        norm = self.step(("policy", "adapters"), loss)
        return {**metrics, "grad/policy": norm}

    def language_loss(self, blocks: Tensor) -> Tensor:
        """Mean cross-entropy of each token given those before it in its block, in nats; blocks int64 [B, L]."""
        assert self.text is not None, "the method was made with text"
        words = self.text.words
        known, following = blocks[:, :-1], blocks[:, 1:]
        tokens = F.embedding(known, words.tokens)
        if words.positions is not None:
            tokens = tokens + words.positions[: known.shape[1]]
        # Output words are the input words: others are refused.
        logits = self.policy.model(tokens) @ words.tokens.T
        return F.cross_entropy(logits.flatten(0, 1), following.flatten())
