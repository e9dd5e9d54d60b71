"""Exports by tracing: the module, the program of torch, the file of ONNX, against `Policy.act`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exporting import CASES, TEXT, make_policy, prompt_of

from llmdpd.errors import InputError
from llmdpd.export import onnx
from llmdpd.export.contents import Prompt
from llmdpd.export.onnx import export_onnx
from llmdpd.export.program import export_torch
from llmdpd.export.seeded import normals
from llmdpd.export.traced import TOLERANCE, Traced
from llmdpd.ops.philox import philox_normal
from llmdpd.policy.session import Seeds

Rng = np.random.Generator


@pytest.mark.parametrize("seeded", [False, True], ids=["noise", "seed"])
@pytest.mark.parametrize("case", CASES)
def test_the_module_acts_as_every_kind_of_policy_does(case: str, seeded: bool, rng: Rng) -> None:
    policy = make_policy(**CASES[case])
    traced = Traced(policy, prompt_of(rng, policy), seeded)
    found = traced.check(lambda inputs: traced.module(**inputs).numpy())
    assert 0 <= found.difference < 1e-3


def test_a_module_of_other_weights_is_refused(rng: Rng) -> None:
    policy = make_policy()
    traced = Traced(policy, prompt_of(rng, policy), False)
    traced.action.chain.u_z += 1e-3
    with pytest.raises(InputError, match="acts otherwise"):
        traced.check(lambda inputs: traced.module(**inputs).numpy())
    with pytest.raises(InputError, match="acts otherwise"):
        traced.check(lambda inputs: traced.module(**inputs).numpy()[:, 0])
    with pytest.raises(InputError, match="acts otherwise"):
        traced.check(lambda inputs: np.full_like(traced.module(**inputs).numpy(), np.nan))


def test_its_noise_is_every_other_backends(rng: Rng) -> None:
    for samples, numbers in ((1, 4), (5, 9), (2, 1)):
        seeds = torch.from_numpy(rng.integers(-(2**63), 2**63, 3, dtype=np.int64))
        expected = philox_normal(seeds, 3, samples, 6, numbers)
        found = normals(seeds, 6, samples, numbers)[..., :numbers]
        assert found.dtype is torch.float32
        np.testing.assert_allclose(found, expected, atol=2e-6, rtol=0)


LOADED = """
import sys, torch, numpy as np
sys.modules["llmdpd"] = None
program = torch.export.load(sys.argv[1]).module()
given = {name: torch.from_numpy(array) for name, array in np.load(sys.argv[2]).items()}
with torch.no_grad():
    np.save(sys.argv[3], program(**given).numpy())
"""


@pytest.mark.slow
def test_a_program_of_torch_loads_without_this_package_and_plays_an_episode(rng: Rng, tmp_path: Path) -> None:
    policy = make_policy()
    prompt = prompt_of(rng, policy)
    checks = export_torch(policy, {"push": prompt}, tmp_path / "out", seeded=True)
    assert checks["push"].difference <= TOLERANCE
    said = json.loads((tmp_path / "out" / "export.json").read_text())
    assert said["inputs"] == {"observation": "float32 [B, 7]", "step": "int64 [B]", "seed": "int64 [B]"}
    steps = 6
    observations, keys = rng.normal(0, 0.3, (steps, 7)).astype(np.float32), Seeds(5)
    given = {"observation": observations, "step": np.arange(steps)}
    np.savez(tmp_path / "given.npz", **given, seed=np.concatenate([keys.next(1) for _ in range(steps)]))
    words = [
        sys.executable,
        "-c",
        LOADED,
        tmp_path / "out" / "push.pt2",
        tmp_path / "given.npz",
        tmp_path / "found.npy",
    ]
    subprocess.run(words, check=True, cwd=tmp_path, timeout=300)
    policy.prompt(*prompt)
    policy.seed(5)
    expected = np.stack([policy.act(row) for row in observations])
    np.testing.assert_allclose(np.load(tmp_path / "found.npy")[:, 0], expected, atol=1e-5)


ONNX = {"default": False, "chunk": True, "soft": True, "bounds": False, "layout": False}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "seeded"), ONNX.items())
def test_onnx_files_are_checked_by_onnxruntime(case: str, seeded: bool, rng: Rng, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    graphs = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    policy = make_policy(**CASES[case])
    checks = export_onnx(policy, {"push": prompt_of(rng, policy)}, tmp_path / "out", seeded=seeded)
    assert checks["push"].difference < 1e-3
    assert checks["push"].microseconds > 0
    model = graphs.load(tmp_path / "out" / "push.onnx")
    graphs.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    traced = Traced(policy, prompt_of(rng, policy), seeded)
    assert [value.name for value in model.graph.input] == list(traced.inputs(1))
    assert json.loads({p.key: p.value for p in model.metadata_props}["llmdpd"])["prompts"] == ["push"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["export.json", "push.onnx"]


@pytest.mark.slow
def test_an_onnx_file_plays_the_policys_episode(rng: Rng, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    policy = make_policy()
    prompts = {"both": prompt_of(rng, policy), "text": Prompt(TEXT)}
    export_onnx(policy, prompts, tmp_path / "out", seeded=True)
    for name, prompt in prompts.items():
        session = runtime.InferenceSession(str(tmp_path / "out" / f"{name}.onnx"))
        policy.prompt(*prompt)
        policy.seed(8)
        keys = Seeds(8)
        for step in range(5):
            observation = rng.normal(0, 0.3, (1, 7)).astype(np.float32)
            given = {"observation": observation, "step": np.array([step]), "seed": keys.next(1)}
            np.testing.assert_allclose(session.run(None, given)[0][:, 0], policy.act(observation), atol=1e-5)


def test_a_missing_package_is_an_error_that_names_the_extra(
    rng: Rng, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy()
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(InputError, match=r"llmdpd\[onnx\]"):
            onnx.export_onnx(policy, {"push": prompt_of(rng, policy)}, tmp_path / "out")
        assert not (tmp_path / "out").exists()
