"""Records episodes of two tasks of gymnasium-robotics' Fetch by a hand-written expert: pick.npz and push.npz."""

import gymnasium
import numpy as np

EPISODES = 40
ABOVE = np.array([0.0, 0.0, 0.1])


def expert(hand, cube, goal, step, push):
    """To the cube, then with it to the goal: pushed from behind, or held."""
    if push:
        way = (goal - cube) * (1, 1, 0)
        far = np.linalg.norm(way)
        back = 0.09 if step < 14 else 0.05 - min(far, 0.05)
        target = cube - back * way / max(far, 1e-6) + ABOVE * (step < 8)
    else:
        target = goal if step > 15 else cube + ABOVE * (step < 6)
    grip = 1 if step < 12 and not push else -1
    return np.append(np.clip(10 * (target - hand), -1, 1), grip).astype(np.float32)


def record(name, env_id):
    env = gymnasium.make(env_id)
    keys = ("observations", "actions", "rewards", "terminals", "timeouts", "is_success")
    rows = {key: [] for key in keys}
    for seed in range(EPISODES):
        seen, _ = env.reset(seed=seed)
        over, step = False, 0
        while not over:
            state = np.concatenate([seen["observation"], seen["desired_goal"]])
            action = expert(state[:3], state[3:6], state[25:], step, name == "push")
            seen, reward, falls, limit, info = env.step(action)
            for key, value in zip(keys, (state, action, reward, falls, limit, info["is_success"]), strict=True):
                rows[key].append(value)
            over, step = falls or limit, step + 1
    np.savez(f"{name}.npz", **rows)


record("pick", "gymnasium_robotics:FetchPickAndPlace-v4")
record("push", "gymnasium_robotics:FetchPush-v4")
