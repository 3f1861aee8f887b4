"""What a checkpoint's state.json may say: it may come from elsewhere, and numbers in it decide what is allocated."""

from __future__ import annotations

import json
from pathlib import Path

MAX_STATE, MAX_COUNT, MAX_RANKS = 2**24, 10**12, 2**16  # bytes; steps and the like; ranks


def wrong_in_state(path: Path) -> str:
    """What a state has that no checkpoint of ours would say, or ''. Raises ValueError for what is no JSON."""
    if path.stat().st_size > MAX_STATE:
        return f"larger than {MAX_STATE:,} bytes"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return "not readable JSON"
    counts = {name: state.get(name) for name in ("step", "world_size")} if isinstance(state, dict) else {}
    parts = state.get("optimizer_steps") if isinstance(state, dict) else None
    counts |= parts if isinstance(parts, dict) else {"optimizer_steps": parts}
    for name, value in counts.items():
        if type(value) is not int or not 0 <= value < MAX_COUNT:
            return f"{str(name)[:40]}: expected a whole number below {MAX_COUNT:,}, got {str(value)[:40]}"
    if not 0 < state["world_size"] <= MAX_RANKS:
        return f"world_size: expected at most {MAX_RANKS:,}, got {state['world_size']:,}"
    for name in ("settings", "identity"):
        if not isinstance(state.get(name), dict):
            return f"{name}: expected an object, got {str(state.get(name))[:40]}"
    tokens = state.get("num_tokens", 0)
    return "" if type(tokens) in (int, float) and tokens >= 0 else f"num_tokens: got {str(tokens)[:40]}"
