"""The memory of episodes: each one's own last steps, whatever comes between."""

from __future__ import annotations

import numpy as np

from llmdpd.nn.episode_memory import EpisodeMemory

S, A = 4, 2


def test_memory_keeps_each_episodes_own_last_steps(rng: np.random.Generator) -> None:
    memory = EpisodeMemory(3, A)
    past: dict[int, list[tuple[np.ndarray, np.ndarray, float, int]]] = {}
    asked: dict[int, float] = {}
    clock = dict.fromkeys(range(5), 0)
    for _ in range(60):
        who = rng.permutation(5)[: rng.integers(1, 6)]
        for episode in who.tolist():
            if rng.random() < 0.15:
                clock[episode] = int(rng.integers(0, 2)) * 50  # it begins anew, or its clock was set
        steps = np.array([clock[episode] for episode in who.tolist()])
        states, actions = (rng.normal(size=(len(who), width)).astype(np.float32) for width in (S, A))
        rewards, targets = rng.normal(size=(2, len(who))).astype(np.float32)
        history = memory.recall(who, steps, states, rewards, targets)
        memory.note(who, actions)
        for row, episode in enumerate(who.tolist()):
            known = past.get(episode, [])
            if not known or known[-1][3] + 1 != steps[row]:
                known, asked[episode] = [], float(targets[row])
            else:
                asked[episode] -= float(rewards[row])
            seen = [*known, (states[row], np.zeros(A), asked[episode], int(steps[row]))][-3:]
            length = int(history.lengths[row])
            assert length == len(seen)
            for column, part in enumerate((history.states, history.actions, history.returns, history.timesteps)):
                expected = np.stack([one[column] for one in seen])
                np.testing.assert_allclose(part[row, :length], expected, rtol=0, atol=1e-4)
                assert not part[row, length:].any()
            past[episode] = [*known, (states[row], actions[row], asked[episode], int(steps[row]))]
            clock[episode] = int(steps[row]) + 1
    memory.reset()
    assert memory.recall(who, steps + 1, states, rewards, targets).lengths.tolist() == [1] * len(who)
