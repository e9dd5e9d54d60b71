"""The paper's two language models by name, on tiny random models of their architectures in a made-up hub cache."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from llmdpd.policy.policy import Policy  # noqa: E402
from llmdpd.prompts import metaworld_prompt  # noqa: E402
from llmdpd.prompts.llm import INSTRUCTION, LLMEncoder  # noqa: E402

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXTS = [metaworld_prompt("push-v3").render(), "reach a goal", metaworld_prompt("door-lock-v3").render()]


@dataclass(frozen=True)
class Made:
    """What was put into the hub's cache under a hub id."""

    name: str
    hub_id: str
    commit: str
    folder: Path
    causal: type[Any]


def llama() -> Any:
    """Llama-3's make: fewer key than query heads, its rotary base, untied head."""
    config = transformers.LlamaConfig(
        vocab_size=700, num_key_value_heads=2, rope_theta=500_000.0, max_position_embeddings=8192, pad_token_id=None,
        bos_token_id=0, eos_token_id=1, tie_word_embeddings=False, **SIZES,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def olmo() -> Any:
    """OLMo-1B's: norms without weights, head tied to the embeddings."""
    config = transformers.OlmoConfig(
        vocab_size=700, max_position_embeddings=2048, pad_token_id=1, eos_token_id=0, tie_word_embeddings=True, **SIZES
    )
    return transformers.OlmoForCausalLM(config)


def olmo2() -> Any:
    config = transformers.Olmo2Config(vocab_size=700, max_position_embeddings=4096, pad_token_id=1, **SIZES)
    return transformers.Olmo2ForCausalLM(config)


MODELS = {
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", llama),
    "olmo-1b": ("allenai/OLMo-1B-hf", olmo),
    "allenai/OLMo-2-0425-1B": ("allenai/OLMo-2-0425-1B", olmo2),
}
NAMES = pytest.mark.parametrize("name", MODELS)


def save_tokenizer(folder: Path, name: str) -> None:
    """Byte-level BPE as theirs; Llama's begins with a token and has none for padding, OLMo's the other way round."""
    begins = name == "llama-3-8b"
    special = ["<|begin_of_text|>", "<|end_of_text|>"] if begins else ["<|endoftext|>", "<|padding|>"]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([INSTRUCTION, *TEXTS], trainer)
    if begins:
        bpe.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
        )
    tokens = {"bos_token": special[0], "eos_token": special[1]} if begins else {"eos_token": special[0]}
    tokens |= {} if begins else {"pad_token": special[1]}
    side = "left" if begins else "right"
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, padding_side=side, **tokens).save_pretrained(folder)


def put_into_hub(hub: Path, name: str) -> Made:
    """Save a model as the hub's cache has it: blobs, a snapshot of links to them, a ref. Llama's weights in shards."""
    hub_id, make = MODELS[name]
    model = make().to(torch.bfloat16)
    with torch.no_grad():  # freshly made weights are so small that everything looks alike
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    plain = hub.parent / f"plain-{name.replace('/', '-')}"
    model.save_pretrained(plain, max_shard_size="40KB" if name == "llama-3-8b" else "5GB")
    save_tokenizer(plain, name)
    commit = secrets.token_hex(20)
    repository = hub / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for file in plain.iterdir():
        blob = repository / "blobs" / secrets.token_hex(20)
        file.rename(blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return Made(name, hub_id, commit, snapshot, type(model))


@pytest.fixture(scope="module")
def hub(
    request: pytest.FixtureRequest, seed_of: Callable[[str], int], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Made]]:
    torch.manual_seed(seed_of(request.node.nodeid))
    folder = tmp_path_factory.mktemp("huggingface") / "hub"
    return folder, {name: put_into_hub(folder, name) for name in MODELS}


@pytest.fixture
def made(hub: tuple[Path, dict[str, Made]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Made]:
    """The hub's cache in place of the user's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub[0]))
    return hub[1]


def by_hand(model: Made, text: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The causal model's own last hidden layer of one text, nothing padded, averaged over all its tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.folder)
    ids = tokenizer(f"{INSTRUCTION}\n{text}", return_tensors="pt")["input_ids"]
    network = model.causal.from_pretrained(model.folder, dtype=dtype).eval()
    with torch.no_grad():
        hidden: torch.Tensor = network(ids, output_hidden_states=True).hidden_states[-1][0].float()
    assert (ids == 0).sum() == (model.name == "llama-3-8b")  # Llama's first token, which counts
    return hidden.mean(0)


@NAMES
@pytest.mark.usefixtures("no_network")
def test_found_by_name_and_embedded_offline(made: dict[str, Made], cache_dir: Path, name: str) -> None:
    model = made[name]
    encoder = LLMEncoder(name, cache_dir=cache_dir)
    identity = encoder.identity
    assert (identity.model, identity.revision, identity.dtype) == (model.hub_id, model.commit, "float32")
    assert encoder.dim == 32
    embedded = encoder.encode(TEXTS)
    assert embedded.dtype == torch.float32
    for text, vector in zip(TEXTS, embedded, strict=True):
        torch.testing.assert_close(vector, by_hand(model, text), rtol=1e-4, atol=1e-4)
    assert torch.equal(LLMEncoder(model.hub_id, cache_dir=cache_dir).encode(TEXTS), embedded)
    # Texts of unequal lengths in one pass, by a tokenizer without a padding token, or one that pads on the left.
    together = LLMEncoder(name, cache_dir=cache_dir / "together", batch_size=3).encode(TEXTS)
    torch.testing.assert_close(together, embedded, rtol=1e-4, atol=1e-4)
    # In bfloat16, as the weights are stored.
    rounded = LLMEncoder(name, cache_dir=cache_dir, dtype="bfloat16").encode(TEXTS[1:2])
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, embedded[1:2])
    torch.testing.assert_close(rounded[0], by_hand(model, TEXTS[1], torch.bfloat16), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("name", "chosen"), [("llama-3-8b", ["--llm", "llama-3-8b"]), ("olmo-1b", ["--preset", "metaworld-olmo-1b"])]
)
def test_a_run_from_beginning_to_end(
    made: dict[str, Made],
    tmp_path: Path,
    train: Callable[..., int],
    tiny_options: list[str],
    rng: np.random.Generator,
    name: str,
    chosen: list[str],
) -> None:
    short = {"training.iterations": 4, "training.select-every": 0, "evaluation.episodes": 1, "evaluation.max-steps": 3}
    words = [word for field, value in short.items() for word in (f"--{field}", str(value))]
    assert train("--run-dir", tmp_path / "run", *tiny_options, *words, *chosen) == 0
    model = made[name]
    policy = Policy.load(tmp_path / "run")
    assert policy.llm == name
    assert policy.metadata["llm"] == {"model": model.hub_id, "revision": model.commit, "dtype": "float32"}
    assert policy.network.embedding_dim == 32
    assert len(policy.texts) == 3
    text = metaworld_prompt("push-v3").render()
    torch.testing.assert_close(policy._embed(text), by_hand(model, text), rtol=1e-4, atol=1e-4)
    # A text that it was not trained with: the model is found again by its name.
    example = (rng.normal(size=(9, 39)), rng.uniform(-1, 1, (9, 4)))
    policy.prompt(text="Carry the cup to the shelf.", trajectory=example)
    assert policy.act(rng.normal(size=39)).shape == (4,)
    records = json.loads((tmp_path / "run" / "results.json").read_text())["records"]
    assert [record["prompts"]["text"] for record in records] == ["built in"] * len(records)
