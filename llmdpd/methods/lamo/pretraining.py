"""Pre-training a small GPT-2 on a text, for machines without GPT-2's weights or too small to train with them.

Layers, tokenizer and files are those of GPT-2 (Radford et al. 2019) by `transformers`; the byte-level vocabulary is
learned from all of the same text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmdpd.errors import InputError, TrainingDivergedError
from llmdpd.methods.lamo.corpus import Corpus, find_corpus, read_texts, tokenize
from llmdpd.prompts.transformer import no_progress_bars
from llmdpd.utils.bounds import Bounds, Count, Layers, Seed, SharedByHeads, Width, check_config
from llmdpd.utils.extras import extra
from llmdpd.utils.files import atomic_directory, atomic_write_json
from llmdpd.utils.tensors import not_finite

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

Progress = Callable[[int, int, str], None]
_END = "<|endoftext|>"
_HELD_OUT, _MOST_HELD_OUT = 0.05, 100_000
_WEIGHT_DECAY, _CLIP, _WARMUP = 0.1, 1.0, 0.05


@dataclass(frozen=True)
class PretrainConfig(SharedByHeads):
    """Pre-train a small GPT-2 on text, for `llmdpd.train --method lamo --method.model OUT`."""

    corpus: str
    """Text to learn from: a file or a folder of .txt or .parquet, or the hub id of a data set in the hub's cache."""
    out: Path
    """Folder of the model; must not exist."""
    layers: Layers = 3
    """Transformer blocks."""
    heads: Width = 4
    """Attention heads; they divide the width."""
    width: Width = 128
    """Width of a token embedding."""
    positions: Annotated[int, Bounds(2)] = 256
    """Tokens of a block of text, the model's context length."""
    vocabulary: Annotated[int, Bounds(257)] = 4096
    """Size of the vocabulary, at least 257: all bytes and the end of a text."""
    iterations: Count = 1000
    """Gradient steps."""
    batch_size: Count = 16
    """Blocks of a gradient step."""
    lr: Annotated[float, Bounds(1e-12)] = 1e-3
    """Learning rate of AdamW, after a linear warm-up; it decays by a cosine to 0."""
    seed: Seed = 0
    """Seed of the initial weights and of the sampled blocks."""


@dataclass(frozen=True)
class Pretrained:
    """The result. The losses, in nats per token, are on the end of the text, which is held out from training.

    It is the last 5 % of the tokens, at most 100,000; the vocabulary is learned from the whole text.
    """

    folder: Path
    parameters: int
    vocabulary: int
    tokens: int
    loss_before: float
    loss: float


def pretrain_gpt2(config: PretrainConfig, progress: Progress | None = None) -> Pretrained:
    """Train a GPT-2 on the CPU and write it, as `transformers` does, to `config.out`: whole, or not at all.

    Args:
        config: see `PretrainConfig`.
        progress: called after every gradient step with steps done, their total, and a note; may raise to stop.

    Raises:
        InputError: a number out of range, text that is not here or too short, a folder that exists already or can't be.
        TrainingDivergedError: a loss or a weight that is no number.
    """
    check_config(config)
    _check_free(config.out)
    corpus = find_corpus(config.corpus, "corpus")
    tokenizer = _learn_vocabulary(corpus, config.vocabulary)
    tokens = tokenize(corpus, tokenizer)
    held_out = max(min(int(len(tokens) * _HELD_OUT), _MOST_HELD_OUT), config.positions)
    if len(tokens) < 2 * held_out:
        problem, found, least = "too little text to learn from", f"{len(tokens):,} tokens", f"at least {2 * held_out:,}"
        raise InputError(problem, path=corpus.files[0], field="corpus", found=found, expected=least)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = _make_model(config, len(tokenizer))
        before = _loss(model, tokens[-held_out:], config)
        _learn(model, tokens[:-held_out], config, progress)
        # A loss is of the weights before its step: the last one's are seen by themselves only.
        if (name := not_finite(model.state_dict())) is not None:
            raise TrainingDivergedError(f"NaN or Inf in {name} after the last step; nothing is written: a lower --lr")
        after = _loss(model, tokens[-held_out:], config)
    _check_free(config.out)
    done = Pretrained(config.out, model.num_parameters(), len(tokenizer), len(tokens), before, after)
    with atomic_directory(config.out) as folder, no_progress_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        metadata = {"corpus_sha256": corpus.sha256(), "iterations": config.iterations, "seed": config.seed}
        atomic_write_json(folder / "pretraining.json", {**metadata, "loss_before": before, "loss": after})
    return done


def _check_free(out: Path) -> None:
    """Raise `InputError` if `out` exists or its parent is a file; called before the work and again before writing."""
    try:
        if out.exists():
            raise InputError("something is there already", path=out, field="out", expected="a new folder")
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        problem, expected = "a file is where a folder is to be", "a folder, or nothing yet"
        raise InputError(problem, path=out.parent, field="out", expected=expected) from None


def _learn_vocabulary(corpus: Corpus, size: int) -> PreTrainedTokenizerFast:
    with extra("lamo"):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(read_texts(corpus), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_END, eos_token=_END, unk_token=_END)


def _make_model(config: PretrainConfig, vocabulary: int) -> GPT2LMHeadModel:
    with extra("lamo"):
        from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"vocab_size": vocabulary, "n_positions": config.positions, "n_embd": config.width}
    sizes |= {"n_layer": config.layers, "n_head": config.heads}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes))


def _learn(model: GPT2LMHeadModel, tokens: Tensor, config: PretrainConfig, progress: Progress | None) -> None:
    with extra("lamo"):
        from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=_WEIGHT_DECAY)
    warmup = max(1, int(_WARMUP * config.iterations))
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, config.iterations)
    model.train()
    for step in range(config.iterations):
        starts = torch.randint(len(tokens) - config.positions + 1, (config.batch_size, 1))
        blocks = tokens[starts + torch.arange(config.positions)].long()
        optimizer.zero_grad()
        loss = _cross_entropy(model, blocks)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        schedule.step()
        now = loss.item()
        if not math.isfinite(now):
            raise TrainingDivergedError(f"the loss is {now} in iteration {step + 1}; nothing is written: a lower --lr")
        if progress is not None:
            progress(step + 1, config.iterations, f"loss {now:.2f}")
    model.eval()


@torch.no_grad()
def _loss(model: GPT2LMHeadModel, tokens: Tensor, config: PretrainConfig) -> float:
    """Nats per token, over the text cut into blocks; an incomplete last block is not counted."""
    model.eval()
    whole = len(tokens) // config.positions * config.positions
    blocks = tokens[:whole].long().view(-1, config.positions)
    losses = [len(part) * _cross_entropy(model, part) for part in blocks.split(config.batch_size)]
    return float(torch.stack(losses).sum() / len(blocks))


def _cross_entropy(model: GPT2LMHeadModel, blocks: Tensor) -> Tensor:
    """Mean over all tokens of blocks [B, N] but the first, each predicted from those before it."""
    logits = model(blocks).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
