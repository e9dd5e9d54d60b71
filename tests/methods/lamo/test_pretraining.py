"""A small GPT-2 from a text: it learns, lamo reads it, a seed gives it again; what is refused, nothing half written."""

from __future__ import annotations

import dataclasses
import math
import string
from pathlib import Path

import numpy as np
import pytest
import torch

from llmdpd.cli.pretrain import main
from llmdpd.errors import InputError, TrainingDivergedError
from llmdpd.methods.lamo.corpus import find_corpus, read_tokens
from llmdpd.methods.lamo.language_model import find_language_model, load_language_model
from llmdpd.methods.lamo.pretraining import PretrainConfig, pretrain_gpt2

SIZES = {"layers": 1, "heads": 2, "width": 16, "positions": 12, "vocabulary": 270, "iterations": 60, "batch_size": 8}


@pytest.fixture
def config(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> PretrainConfig:
    """Text of few words; the cache is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["".join(rng.choice(list(string.ascii_lowercase), 3)) for _ in range(6)]
    lines = [f"{' '.join(rng.choice(words, 8))}\n" for _ in range(200)]
    (tmp_path / "text.txt").write_text("".join(lines) + "æøå\n")
    return PretrainConfig(corpus=str(tmp_path / "text.txt"), out=tmp_path / "model", lr=1e-2, **SIZES)


def test_it_learns_and_lamo_reads_it(config: PretrainConfig) -> None:
    done: list[int] = []
    made = pretrain_gpt2(config, lambda step, total, words: done.append(step))
    assert done == list(range(1, 61))
    assert abs(made.loss_before - math.log(270)) < 0.5
    assert made.loss < 0.6 * made.loss_before
    model = find_language_model(str(config.out))
    assert (model.sizes.layers, model.sizes.heads, model.sizes.width, model.positions) == (1, 2, 16, 12)
    weights, words = load_language_model(model)
    assert words.tokens.shape == (made.vocabulary, 16)
    assert sum(w.numel() for w in (*weights.values(), words.tokens, words.positions)) == made.parameters

    from transformers import AutoTokenizer, GPT2LMHeadModel

    tokens = read_tokens(find_corpus(config.corpus), model)
    assert len(tokens) == made.tokens
    text = Path(config.corpus).read_text()
    assert AutoTokenizer.from_pretrained(config.out).decode(tokens) == text
    held_out = int(0.05 * len(tokens))
    blocks = tokens[len(tokens) - held_out :][: held_out // 12 * 12].long().view(-1, 12)
    own = GPT2LMHeadModel.from_pretrained(config.out).eval()(blocks, labels=blocks).loss
    assert made.loss == pytest.approx(own.item(), rel=1e-4)


def test_what_is_held_out_is_not_learned_from(config: PretrainConfig) -> None:
    """Its lines stand in another order, so that vocabulary and number of tokens stay: so do the weights."""
    path = Path(config.corpus)
    lines = path.read_text().splitlines(keepends=True)
    last = [*lines[-6:], lines[-7]]
    assert last != lines[-7:]
    losses, weights = [], []
    for end, out in ((lines[-7:], "one"), (last, "two")):
        path.write_text("".join([*lines[:-7], *end]))
        made = pretrain_gpt2(dataclasses.replace(config, out=config.out.with_name(out), iterations=10))
        losses.append(made.loss)
        weights.append((made.folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert losses[0] != losses[1]


def test_the_same_seed_gives_the_same_model(config: PretrainConfig) -> None:
    before = torch.random.get_rng_state()
    short = dataclasses.replace(config, iterations=5)
    folders = [config.out.with_name(name) for name in ("one", "two", "other")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        pretrain_gpt2(dataclasses.replace(short, out=folder, seed=seed))
    one, two, other = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert one == two
    assert one != other
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        ({"layers": 0}, "layers", "1 to 128"),
        ({"vocabulary": 256}, "vocabulary", "a finite number, at least 257"),
        ({"iterations": 0}, "iterations", "a finite number, at least 1"),
        ({"heads": 3}, "heads", "a divisor of 16 (width)"),
        ({"lr": math.inf}, "lr", "a finite number, at least 1e-12"),
        ({"lr": 0.0}, "lr", "a finite number, at least 1e-12"),
        ({"seed": 2**64}, "seed", f"0 to {2**63 - 1}"),
        ({"positions": 100_000}, "corpus", "at least 200,000"),
    ],
)
def test_what_can_not_be(config: PretrainConfig, changes: dict[str, float], field: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        pretrain_gpt2(dataclasses.replace(config, **changes))  # type: ignore[arg-type]
    assert (caught.value.field, str(caught.value.expected)) == (field, expected)
    assert not config.out.exists()


@pytest.mark.usefixtures("torch_settings")
def test_the_command(
    config: PretrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmdpd.cli.pretrain.usable_cores", lambda: 1)  # several wait longer than they compute here
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    assert main(["--corpus", config.corpus, "--out", str(config.out), *words]) == 0
    told = capsys.readouterr()
    assert "a vocabulary of 270" in told.out
    assert "nats a token" in told.out
    assert not told.err
    assert main(["--corpus", config.corpus, "--out", str(config.out), *words]) == 2
    assert "something is there already" in capsys.readouterr().err


def test_a_place_that_can_not_be_is_refused_before_the_work(config: PretrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    changes: list[tuple[dict[str, object], str, str]] = [
        ({"out": tmp_path / "mine"}, "out", "something is there already"),
        ({"out": tmp_path / "file" / "model"}, "out", "a file is where"),
        ({"corpus": "no/such"}, "corpus", "not on this machine"),
    ]
    for change, field, problem in changes:
        with pytest.raises(InputError, match=problem) as caught:
            pretrain_gpt2(dataclasses.replace(config, **change), lambda *_: pytest.fail("it has begun"))  # type: ignore[arg-type]
        assert caught.value.field == field
        assert "lamo" not in str(caught.value.hint)


def test_weights_that_the_last_step_made_nan_are_not_written(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No loss has seen them: each is of the weights before its step."""
    real = torch.optim.AdamW.step

    def step(optimizer: torch.optim.AdamW, *arguments: object) -> object:
        done = real(optimizer, *arguments)
        optimizer.param_groups[0]["params"][0].data[0, 0] = torch.nan
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(TrainingDivergedError, match="after the last step"):
        pretrain_gpt2(dataclasses.replace(config, iterations=1))
    assert not config.out.exists()


def test_stopped_or_diverged_it_leaves_nothing(config: PretrainConfig) -> None:
    def stop(step: int, total: int, note: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain_gpt2(config, stop)
    with pytest.raises(TrainingDivergedError, match="nothing is written"):
        pretrain_gpt2(dataclasses.replace(config, lr=1e30))
    assert sorted(path.name for path in config.out.parent.iterdir() if path.name != "cache") == ["text.txt"]
