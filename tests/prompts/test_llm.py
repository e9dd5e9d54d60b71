from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from safetensors.torch import load_file, save_file  # noqa: E402

from llmdpd.errors import InputError  # noqa: E402
from llmdpd.prompts import metaworld_prompt  # noqa: E402
from llmdpd.prompts.llm import INSTRUCTION, LLMEncoder  # noqa: E402
from llmdpd.prompts.transformer import TransformerEmbedder, masked_mean  # noqa: E402
from llmdpd.tasks.metaworld.prompts import all_task_metadata  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_network")

WORDS = ["push", "the", "puck", "to", "a", "goal", "reach", "wall", "convert", "following", "task"]
WORDS += ["structured", "policy"]
SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = ("llama", "olmo", "bert")
TEXTS = ["push the puck", "reach a goal", "push the puck to the wall to a goal reach reach", "wall"]


def save_tokenizer(folder: Path, kind: str) -> None:
    """One token a word; BERT's with [CLS], [SEP], [PAD], Llama's and OLMo's with a beginning and no padding token."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"] if kind == "bert" else ["<unk>", "<s>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=special[0]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    template = "[CLS] $A [SEP]" if kind == "bert" else "<s> $A"
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[(token, vocabulary[token]) for token in special[1:3]]
    )
    # Such a habit in the file, which MiniLM's has as well, must have no effect.
    tokenizer.enable_truncation(3)
    pad = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"} if kind == "bert" else {"bos_token": "<s>"}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=special[0], model_max_length=10**30, padding_side="left", **pad
    )
    fast.save_pretrained(folder)


def save_model(folder: Path, kind: str) -> Path:
    config = {
        "llama": transformers.LlamaConfig(vocab_size=40, max_position_embeddings=64, **SIZES),
        "olmo": transformers.OlmoConfig(vocab_size=40, max_position_embeddings=64, **SIZES),
        "bert": transformers.BertConfig(vocab_size=40, max_position_embeddings=64, pad_token_id=3, **SIZES),
    }[kind]
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():  # freshly made weights are so small that everything looks alike
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    save_tokenizer(folder, kind)
    return folder


@pytest.fixture(scope="module")
def folders(
    request: pytest.FixtureRequest, seed_of: Callable[[str], int], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    torch.manual_seed(seed_of(request.node.nodeid))
    return {kind: save_model(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def by_hand(folder: Path, kind: str, text: str) -> torch.Tensor:
    """One text alone, its tokens written down by hand: the mean over all of them, nothing padded."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"] if kind == "bert" else ["<unk>", "<s>"]
    vocabulary = [*special, *WORDS]
    words = [vocabulary.index(word) if word in vocabulary else 0 for word in text.split()]
    ids = [1, *words, 2] if kind == "bert" else [1, *words]
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).last_hidden_state[0].mean(dim=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_embedding_is_the_mean_over_the_tokens(
    folders: dict[str, Path], cache_dir: Path, kind: str, batch_size: int
) -> None:
    encoder = LLMEncoder(folders[kind], instruction="convert the task", cache_dir=cache_dir, batch_size=batch_size)
    embedded = encoder.encode(TEXTS)
    assert embedded.shape == (len(TEXTS), encoder.dim)
    assert embedded.dtype == torch.float32
    assert encoder.dim == 24
    for text, vector in zip(TEXTS, embedded, strict=True):
        expected = by_hand(folders[kind], kind, f"convert the task {text}")
        torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_batch_of_one_the_company_changes_no_bit(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    together = LLMEncoder(folders[kind], cache_dir=tmp_path / "a").encode(TEXTS)
    alone = LLMEncoder(folders[kind], cache_dir=tmp_path / "b").encode(TEXTS[1:2])
    assert torch.equal(together[1:2], alone)


def test_instruction_is_read_and_may_be_empty(folders: dict[str, Path], cache_dir: Path) -> None:
    plain = LLMEncoder(folders["llama"], instruction="", cache_dir=cache_dir).encode(["push a puck"])
    told = LLMEncoder(folders["llama"], cache_dir=cache_dir).encode(["push a puck"])
    torch.testing.assert_close(plain[0], by_hand(folders["llama"], "llama", "push a puck"), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, told, atol=1e-3)
    assert "structured policy representation" in INSTRUCTION


def test_masked_mean_ignores_padding_on_either_side(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 5, 3, generator=generator)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    expected = torch.stack([hidden[0, 2:].mean(dim=0), hidden[1, :2].mean(dim=0)])
    hidden[0, 0], hidden[1, 4] = float("nan"), float("inf")
    torch.testing.assert_close(masked_mean(hidden, mask), expected)
    assert masked_mean(hidden.bfloat16(), mask).dtype == torch.float32


def test_cached_texts_never_load_the_model(
    folders: dict[str, Path], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = LLMEncoder(folders["bert"], cache_dir=cache_dir).encode(TEXTS)
    monkeypatch.setattr(TransformerEmbedder, "_load", lambda self: pytest.fail("the model was loaded"))
    again = LLMEncoder(folders["bert"], cache_dir=cache_dir).encode([TEXTS[2], TEXTS[0], TEXTS[2]])
    assert torch.equal(again, embedded[[2, 0, 2]])


def test_only_new_texts_are_embedded_and_each_once(
    folders: dict[str, Path], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = LLMEncoder(folders["bert"], cache_dir=cache_dir)
    encoder.encode(TEXTS[:2])
    embed, seen = encoder._embedder.embed, []
    monkeypatch.setattr(encoder._embedder, "embed", lambda prompts: seen.extend(prompts) or embed(prompts))
    encoder.encode([TEXTS[2], TEXTS[0], TEXTS[2]])
    assert seen == [f"{INSTRUCTION}\n{TEXTS[2]}"]
    encoder.release()
    assert encoder.encode(["goal"]).shape == (1, 24)


def test_a_damaged_cache_file_is_computed_again(
    folders: dict[str, Path], cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = LLMEncoder(folders["bert"], cache_dir=cache_dir)
    embedded = encoder.encode(TEXTS[:1])
    (file,) = cache_dir.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x40
    file.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(encoder.encode(TEXTS[:1]), embedded)
    assert "altered" in caplog.text
    caplog.clear()
    assert torch.equal(encoder.encode(TEXTS[:1]), embedded)
    assert not caplog.text


def test_other_weights_are_another_model(folders: dict[str, Path], tmp_path: Path, cache_dir: Path) -> None:
    first = LLMEncoder(folders["llama"], cache_dir=cache_dir).encode(TEXTS)
    torch.manual_seed(1)
    other = LLMEncoder(save_model(tmp_path / "llama", "llama"), cache_dir=cache_dir).encode(TEXTS)
    assert not torch.allclose(first, other, atol=1e-2)


def test_the_limit_of_tokens(folders: dict[str, Path], cache_dir: Path) -> None:
    encoder = LLMEncoder(folders["llama"], instruction="", cache_dir=cache_dir)
    assert encoder.encode(["push " * 63]).shape == (1, 24)
    assert encoder.encode([]).shape == (0, 24)
    short = LLMEncoder(folders["llama"], instruction="", cache_dir=cache_dir, max_tokens=5)
    short.encode(["push the puck to"])
    with pytest.raises(InputError, match="at most 5"):
        short.encode(["push the puck to a"])
    with pytest.raises(InputError, match="fewer positions"):
        LLMEncoder(folders["llama"], cache_dir=cache_dir, max_tokens=65).encode(["push"])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"device": "no-such-device"}, "no such device"),
        ({"device": "cuda:99"}, "GPU that was asked for is absent"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"dtype": torch.int8}, "unknown dtype"),
        ({"max_tokens": 0}, "limit of tokens"),
        ({"batch_size": 0}, "batch size"),
    ],
)
def test_bad_settings(folders: dict[str, Path], cache_dir: Path, settings: dict[str, object], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        LLMEncoder(folders["llama"], cache_dir=cache_dir, **settings)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_bfloat16_is_the_default(folders: dict[str, Path], cache_dir: Path) -> None:
    encoder = LLMEncoder(folders["llama"], cache_dir=cache_dir, device="cuda")
    assert encoder.dtype == torch.bfloat16
    embedded = encoder.encode(TEXTS)
    assert embedded.device.type == "cpu"
    exact = LLMEncoder(folders["llama"], cache_dir=cache_dir).encode(TEXTS)
    assert torch.nn.functional.cosine_similarity(exact, embedded).min() > 0.99


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_models_own_code_is_not_run(folders: dict[str, Path], tmp_path: Path, cache_dir: Path) -> None:
    folder = copy_of(folders["llama"], tmp_path / "code")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "mine"
    config["auto_map"] = {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="cannot load"):
        LLMEncoder(folder, cache_dir=cache_dir).encode(["push"])
    assert not (tmp_path / "ran").exists()


def test_minilm_reads_all_50_prompts(cache_dir: Path) -> None:
    encoder = LLMEncoder(cache_dir=cache_dir)
    assert encoder.dim == 384
    embedder = encoder._embedder
    _, tokenizer, limit = embedder._load()
    assert limit == 512
    prompts = [metaworld_prompt(name).render() for name in all_task_metadata()]
    lengths = [len(embedder._tokenize(tokenizer, f"{INSTRUCTION}\n{prompt}", limit)) for prompt in prompts]
    assert max(lengths) <= 256  # what MiniLM's sentence configuration would read
    assert min(lengths) > 130  # and its tokenizer file's own truncation to 128 is off
    embedded = encoder.encode([prompts[0], prompts[1], prompts[0]])
    assert torch.equal(embedded[0], embedded[2])
    assert not torch.allclose(embedded[0], embedded[1], atol=1e-2)


def test_minilm_reads_the_prompts_of_gymnasiums_environments(cache_dir: Path) -> None:
    gymnasium = pytest.importorskip("gymnasium")
    from llmdpd.prompts import environment_prompt

    encoder = LLMEncoder(cache_dir=cache_dir)
    embedder = encoder._embedder
    _, tokenizer, limit = embedder._load()
    read = 0
    for env_id, spec in gymnasium.registry.items():
        if not str(spec.entry_point).startswith("gymnasium."):
            continue  # another package's, which another test imported
        try:
            prompt = environment_prompt(env_id)
        except InputError:
            continue  # an extra of Gymnasium that is not installed, or a version that left it
        embedder._tokenize(tokenizer, f"{INSTRUCTION}\n{prompt.render()}", limit)
        read += 1
    assert read >= 10


def test_minilm_tells_meanings_apart(cache_dir: Path) -> None:
    encoder = LLMEncoder(cache_dir=cache_dir, instruction="")
    texts = ["Open the drawer.", "Pull the drawer out towards you.", "Run forward on two legs."]
    vectors = torch.nn.functional.normalize(encoder.encode(texts), dim=1).numpy()
    near, far = np.dot(vectors[0], vectors[1]), np.dot(vectors[0], vectors[2])
    assert near > far + 0.2


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:50])


def shorten(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 8}))


@pytest.mark.parametrize(
    ("spoil", "texts", "problem"),
    [
        (lambda f: change_weights(f, lambda w: w.pop("layers.1.mlp.up_proj.weight")), ["a"], r"incomplete.*up_proj"),
        (lambda f: change_weights(f, lambda w: w["norm.weight"].fill_(torch.nan)), ["a"], "not finite"),
        *[(cut(file), ["a"], "cannot load") for file in ("config.json", "model.safetensors", "tokenizer.json")],
        (lambda f: transformers.T5Config(d_model=24).save_pretrained(f), ["a"], "encoder-decoder"),
        (shorten, ["push " * 8], "too long.*push push.*9 tokens.*at most 8"),  # the tokenizer's own limit
        (lambda f: None, ["push " * 64], "too long.*65 tokens.*at most 64"),  # one position is taken by <s>
        (lambda f: None, ["push", " \n"], "empty text prompt"),
        (lambda f: None, "push", "sequence"),
    ],
)
def test_what_cannot_be_embedded_is_refused_and_not_cached(
    folders: dict[str, Path], tmp_path: Path, cache_dir: Path, spoil: Any, texts: Any, problem: str
) -> None:
    folder = copy_of(folders["llama"], tmp_path / "copy")
    spoil(folder)
    with pytest.raises(InputError, match=f"(?s){problem}"):
        LLMEncoder(folder, instruction="", cache_dir=cache_dir).encode(texts)
    assert not list(cache_dir.glob("*.safetensors"))
