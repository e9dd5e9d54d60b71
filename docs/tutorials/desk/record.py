"""Records 40 episodes of each task by the desk's expert, as Minari data sets; every other episode is noisy."""

import gymnasium
import minari
import numpy as np
from desk import TASKS, Desk

rng = np.random.default_rng(0)
for task, (text, _) in TASKS.items():
    env = minari.DataCollector(gymnasium.wrappers.TimeLimit(Desk(task), 60), record_infos=True)
    for episode in range(40):
        env.reset(seed=episode)
        noise, over, left = 0.3 * (episode % 2), False, 5
        while not over and left:
            action = env.unwrapped.expert()
            action[:2] += rng.normal(0, noise, 2)
            _, _, _, over, info = env.step(np.clip(action, -1, 1))
            left -= info["success"]
    env.create_dataset(f"desk/{task}-v0", description=text)
    env.close()
