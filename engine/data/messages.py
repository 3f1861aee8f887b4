"""One conversation of a row, read strictly: messages with calls, thoughts and weights, and tools that may be called.

Every key of a message is used (given to the chat template, or decides what is trained), noted as not used, or refused.
A key that is null says nothing: columns of a table give every row every key.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from engine.data.rows import BadRow, checked_text, kind, parse_json
from engine.errors import nearest

MAX_DEPTH = 64  # of tools and arguments
MAX_MESSAGES = 1024  # of a conversation; a turn is found by rendering all before it: some seconds for so many
ROLES = ("system", "user", "assistant", "tool")
ALSO_ROLES = {"developer": "system", "function": "tool"}  # OpenAI's newer and older names
WEIGHTS = ("weight", "train", "training", "trainable", "loss_mask")  # OpenAI, axolotl, axolotl, verl, verl
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # DeepSeek and Qwen, gpt-oss, OpenRouter
READ = ("role", "content", "tool_calls", "function_call", "tool_call_id", "name", *THOUGHTS, *WEIGHTS)

Message = dict[str, Any]
Notes = Counter  # (what happened, to what) → in how many rows or messages: ('not used', 'source') → 12


@dataclass(frozen=True)
class Conversation:
    """Messages under the names that chat templates know: role, content (always text), and where they are said
    reasoning_content, tool_calls (OpenAI's form, arguments as an object), tool_call_id, name.

    `untrained` are the assistant's turns that are context alone.
    """

    messages: list[Message]
    tools: list[dict] | None = None
    untrained: frozenset[int] = frozenset()


def read(value: Any, field: str, notes: Notes) -> Conversation:
    """A non-empty list of messages, or its JSON text. Raises BadRow."""
    value = parsed(value, field)
    if not isinstance(value, list):
        raise BadRow(f"{field}: expected a list of messages, got {kind(value)}")
    if not value:
        raise BadRow(f"{field}: expected a list of messages, got an empty one")
    messages, untrained = [], set()
    for i, given in enumerate(value):
        message, trained = _message(given, f"{field}[{i}]", notes)
        messages.append(message)
        if message["role"] == "assistant" and not trained:
            untrained.add(i)
    return Conversation(messages, untrained=frozenset(untrained))


def _message(given: Any, where: str, notes: Notes) -> tuple[Message, bool]:
    """(the message, whether it may be trained)."""
    if not isinstance(given, dict):
        raise BadRow(f"{where}: expected an object with role and content, got {kind(given)}")
    said = {key: value for key, value in given.items() if value is not None}
    role = said.get("role")
    if not isinstance(role, str):
        got = kind(given["role"]) if "role" in given else f"nothing{nearest('role', given)}"
        raise BadRow(f"{where}.role: expected text, got {got}")
    role = ALSO_ROLES.get(role, role)
    if role not in ROLES:
        raise BadRow(f"{where}.role: expected one of {', '.join(ROLES)}, got {role[:40]!r}{nearest(role, ROLES)}")
    calls = _tool_calls(said, role, where, notes)
    message: Message = {"role": role, "content": _content(given, where, optional=bool(calls))}
    if calls:
        message["tool_calls"] = calls
    if thought := _thought(said, role, where):
        message["reasoning_content"] = thought
    for key in ("tool_call_id", "name"):
        if isinstance(said.get(key), str):
            message[key] = checked_text(said[key], f"{where}.{key}")
        elif key in said:
            notes["not used", f"messages[].{key} that is not text"] += 1
    for key in said.keys() - READ:
        notes["not used", f"messages[].{key}"] += 1
    return message, _is_trained(said, role, where, notes)


def _content(given: dict, where: str, optional: bool) -> str:
    """The text of a message; the texts of its parts end to end."""
    content = given.get("content")
    if isinstance(content, str):
        return checked_text(content, f"{where}.content")
    if content is None and optional:
        return ""
    if not isinstance(content, list):
        got = kind(content) if "content" in given else f"nothing{nearest('content', given)}"
        raise BadRow(f"{where}.content: expected text, got {got}")
    texts = []
    for j, part in enumerate(content):
        here = f"{where}.content[{j}]"
        if not isinstance(part, dict):
            raise BadRow(f"{here}: expected a part, an object with type and text, got {kind(part)}")
        if part.get("type", "text") != "text":
            raise BadRow(f"{here}: expected a part of type text, got {str(part['type'])[:40]!r}")
        if not isinstance(part.get("text"), str):
            raise BadRow(f"{here}.text: expected text, got {kind(part.get('text'))}")
        if unread := {key for key, value in part.items() if value is not None} - {"type", "text"}:
            raise BadRow(f"{here}: expected type and text, got {', '.join(sorted(unread))[:80]} beside them")
        texts.append(checked_text(part["text"], f"{here}.text"))
    return "".join(texts)


def _thought(said: dict, role: str, where: str) -> str:
    found = [key for key in THOUGHTS if key in said]
    for key in found:
        if not isinstance(said[key], str):
            raise BadRow(f"{where}.{key}: expected text, got {kind(said[key])}")
        if said[key] != said[found[0]]:
            raise BadRow(f"{where}.{key}: expected the same as {found[0]}, got another thought")
    if not found or not said[found[0]].strip():
        return ""
    if role != "assistant":
        raise BadRow(f"{where}.{found[0]}: expected on the assistant's turns, got it on the {role}'s")
    return checked_text(said[found[0]], f"{where}.{found[0]}")


def _is_trained(said: dict, role: str, where: str, notes: Notes) -> bool:
    """What the first of WEIGHTS says, which the others must not contradict; without one, True."""
    found: dict[str, bool] = {}
    for key in WEIGHTS:
        if key in said:
            if not isinstance(said[key], (bool, int, float)) or said[key] not in (0, 1):
                raise BadRow(f"{where}.{key}: expected 0 or 1 (false or true), got {str(said[key])[:40]!r}")
            found[key] = bool(said[key])
            if role != "assistant" and found[key]:
                notes["not used", f"messages[].{key} of turns that are not the assistant's"] += 1
    if len(set(found.values())) > 1:
        first, second = list(found)[:2]
        raise BadRow(f"{where}.{second}: expected the same as {first}, got the opposite")
    return all(found.values())


def note_lines(notes: Notes) -> list[str]:
    """What of the rows was not used, as lines for the first screen."""
    unread = sorted(which for what, which in notes if what == "not used")
    lines = [f"  not used: {', '.join(unread)}"] if unread else []
    return lines + [f"  {count} {what}" for (what, _), count in sorted(notes.items()) if what != "not used"]


# --- tools ------------------------------------------------------------------------------------------------------------


def _tool_calls(said: dict, role: str, where: str, notes: Notes) -> list[dict]:
    """OpenAI's tool_calls, a list of {name, arguments}, or its older function_call; as text or not."""
    given = {key: parsed(said.get(key), f"{where}.{key}") for key in ("tool_calls", "function_call")}
    given = {key: calls for key, calls in given.items() if calls}
    if not given:
        return []
    if len(given) > 1:
        raise BadRow(f"{where}.function_call: expected tool_calls or function_call, got both")
    [(key, calls)] = given.items()
    if role != "assistant":
        raise BadRow(f"{where}.{key}: expected on the assistant's turns, got it on the {role}'s")
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise BadRow(f"{where}.{key}: expected a list of calls, got {kind(calls)}")
    return [_tool_call(call, f"{where}.{key}[{j}]", notes) for j, call in enumerate(calls)]


def _tool_call(call: Any, where: str, notes: Notes) -> dict:
    if not isinstance(call, dict):
        raise BadRow(f"{where}: expected an object, got {kind(call)}")
    inner = call.get("function")
    function: dict = inner if isinstance(inner, dict) else call
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise BadRow(f"{where}.name: expected the name of a function, got {kind(name)}")
    given = function.get("arguments")
    given = function.get("parameters") if given is None else given
    arguments = parsed(given, f"{where}.arguments")
    arguments = {} if arguments in (None, "") else arguments
    if not isinstance(arguments, dict):
        raise BadRow(f"{where}.arguments: expected an object, or its JSON text, got {kind(arguments)}")
    check_json(arguments, f"{where}.arguments")
    if isinstance(given, dict) and arguments != (kept := _without_nulls(arguments)):
        # a table gives every call every call's arguments
        notes["tool calls with null arguments, which are left out (JSON text keeps them)", ""] += 1
        arguments = kept
    read = {"name": name, "arguments": given} if function is call else {"function": inner}
    for key, value in call.items():
        is_said = key in read or (key, value) == ("type", "function") or (key == "id" and isinstance(value, str))
        if value is not None and value is not given and not is_said and key != "index":
            notes["not used", f"messages[].tool_calls[].{key}"] += 1
    for key, value in function.items() if function is not call else ():
        if value is not None and value is not given and key != "name":
            notes["not used", f"messages[].tool_calls[].function.{key}"] += 1
    checked_text(name, f"{where}.name")
    identity = {"id": checked_text(call["id"], f"{where}.id")} if isinstance(call.get("id"), str) else {}
    return identity | {"type": "function", "function": {"name": name, "arguments": arguments}}


def tools_of(row: dict, notes: Notes) -> list[dict] | None:
    """The row's function schemas as {type: function, function: {name, ...}}, from a list or its JSON text; None for
    none. Raises BadRow.
    """
    is_text, field = isinstance(row.get("tools"), str), "tools"
    value = parsed(row.get("tools"), field)
    if value in (None, "", []):
        return None
    if not isinstance(value, list):
        raise BadRow(f"{field}: expected a list of tools, got {kind(value)}")
    tools = []
    for j, given in enumerate(value):
        tool = parsed(given, f"{field}[{j}]")
        check_json(tool, f"{field}[{j}]")
        if not is_text and not isinstance(given, str) and tool != (kept := _without_nulls(tool)):
            notes["tools with nulls, which are left out (JSON text keeps them)", ""] += 1
            tool = kept
        if not isinstance(tool, dict):
            raise BadRow(f"{field}[{j}]: expected an object, got {kind(tool)}")
        tool = tool if isinstance(tool.get("function"), dict) else {"type": "function", "function": tool}
        if not isinstance(tool["function"].get("name"), str):
            raise BadRow(
                f"{field}[{j}].name: expected the name of a function, got {kind(tool['function'].get('name'))}"
            )
        tools.append(tool)
    return tools


def check_json(value: Any, where: str, depth: int = 0) -> None:
    """Raises BadRow for what JSON cannot say, for text that is none, and for what is nested beyond reason."""
    if depth > MAX_DEPTH:
        raise BadRow(f"{where}: expected at most {MAX_DEPTH} levels, got more")
    if isinstance(value, str):
        checked_text(value, where)
    elif isinstance(value, dict):
        for key, inner in value.items():
            checked_text(str(key), where)
            check_json(inner, where, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            check_json(inner, where, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"{where}: expected a number, got {value}")
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise BadRow(f"{where}: expected JSON, got {kind(value)}")


def leaves(value: Any) -> list[Any]:
    """The texts, numbers and truth values in a JSON value."""
    if isinstance(value, (dict, list)):
        return [leaf for inner in (value.values() if isinstance(value, dict) else value) for leaf in leaves(inner)]
    return [] if value is None else [value]


def _without_nulls(value: Any) -> Any:
    """A JSON value without the keys that only other rows of its table have."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def parsed(value: Any, field: str) -> Any:
    """The object or list that a text is the JSON of (a cell of a table); anything else as it is. Raises BadRow."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return parse_json(checked_text(value, field))
    except BadRow as bad:
        raise BadRow(f"{field}: {bad}") from None


def joined(first: Conversation, second: Conversation) -> Conversation:
    """One conversation of both, with the tools of the second."""
    moved = frozenset(i + len(first.messages) for i in second.untrained)
    return replace(second, messages=[*first.messages, *second.messages], untrained=first.untrained | moved)


def folded(said: Conversation) -> Conversation:
    """The conversation with its system turn at the head of the first turn of the user, for templates that have no
    system role. Raises BadRow if no user's turn follows it.
    """
    first, *others = said.messages
    if first["role"] != "system":
        return said
    if not others or others[0]["role"] != "user":
        raise BadRow("messages[1].role: expected user, into whose turn the system turn is folded, got another role")
    content = f"{first['content']}\n\n{others[0]['content']}"
    return Conversation(
        [others[0] | {"content": content}, *others[1:]], said.tools, frozenset(i - 1 for i in said.untrained)
    )


def texts_of(message: Message) -> list[tuple[str, str]]:
    """(where, text) of everything in a message that the template writes out."""
    found: list[tuple[str, str]] = [
        (key, message[key]) for key in ("content", "reasoning_content", "name", "tool_call_id") if key in message
    ]
    for call in message.get("tool_calls", []):
        arguments = call["function"]["arguments"]
        said = [call.get("id", ""), call["function"]["name"], *map(str, [*arguments, *leaves(arguments)])]
        found += [("tool_calls", text) for text in said]
    return found
