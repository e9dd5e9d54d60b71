"""Every method takes several demonstrations as one prompt, or says that it takes one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.errors import InputError
from llmdpd.methods import METHODS
from llmdpd.prompts.demonstration import make_tokens
from llmdpd.prompts.useful_part import Recorded


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if name != "sac"])  # SAC reads no prompts
@torch.no_grad()
def test_several_demonstrations_or_one(name: str, make_network: Any, make_pairs: Any, rng: np.random.Generator) -> None:
    model = make_network(name)
    if not model.reads.trajectory:
        pytest.skip("reads no demonstration")
    shown = [Recorded(*pair, rng.normal(size=len(pair[0])).astype(np.float32)) for pair in make_pairs(3, 6, 4)]
    text = torch.randn(2, model.embedding_dim) if model.reads.text else None
    tokens = make_tokens(shown, model.reads.encoder, returns=True, counts=(2, 1))
    if model.config.reads_several:
        assert len(model.encode(text, tokens)) == 2
    else:
        with pytest.raises(InputError, match="one demonstration a prompt"):
            model.encode(text, tokens)
