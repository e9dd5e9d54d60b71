"""Descriptions of policies in earlier formats, as those of later ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmdpd.methods import METHODS, legacy_fields
from llmdpd.tasks.metaworld.layout import ACTION_DIM, LAYOUT, STATE_DIM
from llmdpd.utils.legacy import upgraded
from llmdpd.utils.plain import former_names, to_plain


def _with_methods(description: dict[str, Any]) -> dict[str, Any]:
    """Format 1, version 0.1's, as format 2: a method's own network and acting, spaces, metadata."""
    sizes, config = description["sizes"], METHODS[description["method"]].Config()
    default = {"method": {"network": to_plain(config.network), "acting": to_plain(config.acting)}}
    plain = {"policy": description["policy"], "acting": description["acting"]}
    moved = upgraded(plain, config.legacy, default, legacy_fields, former_names(config, "method."))["method"]
    hidden = sizes.get("critic_hidden")
    critic = None if hidden is None else {"hidden": hidden, "sees_prompts": sizes.get("critic_sees_prompts")}
    kept = {name: value for name, value in description.items() if name not in ("sizes", "facts", *plain)}
    spaces = {name: value for name, value in sizes.items() if not name.startswith("critic")}
    return {**kept, **moved, "spaces": spaces, "critic": critic, "metadata": description["facts"]}


def _with_layout(description: dict[str, Any]) -> dict[str, Any]:
    """Format 2 as format 3: the layout stands in the spaces; before, it was Meta-World's wherever one was needed."""
    spaces = description["spaces"]
    shaped = (spaces.get("state_dim"), spaces.get("action_dim")) == (STATE_DIM, ACTION_DIM)
    return {**description, "spaces": {**spaces, "layout": to_plain(LAYOUT) if shaped else None}}


UPGRADES: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _with_methods, 2: _with_layout}
"""Format → what makes the next one of a description."""
