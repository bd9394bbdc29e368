"""One record of a data set, understood: a chat, or a text.

The forms that people have: ``messages`` (role, content), ShareGPT's ``conversations`` (from, value), ``prompt`` and
``completion``, ``instruction``, ``input`` and ``output``, preference pairs (``chosen`` is used, ``rejected`` is not), and
``text``. A record that has several is read as the first of them in this order: the chat, not a text that some other model's
template made of it. What is not understood is refused with its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qkit.errors import BadCalibration
from qkit.files.safefile import shown

FORMS = "messages, conversations, chosen, prompt and completion, instruction and output, or text"
_ROLES = {
    "human": "user", "user": "user", "prompter": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "bot": "assistant", "function_call": "assistant",
    "system": "system", "developer": "developer",
    "tool": "tool", "function": "tool", "function_response": "tool", "observation": "tool", "ipython": "ipython",
}  # fmt: skip
_QUESTIONS, _ANSWERS = ("prompt", "question", "query"), ("completion", "response", "answer", "output")
_TURN = re.compile(r"\n*\n(Human|Assistant):[ ]?")  # of texts with two speakers, as in preference pairs of helpfulness


@dataclass(frozen=True)
class Record:
    """A chat or a text.

    where: its place, for messages; form: what it was read as; text: of a text, else ''; messages: of a chat, each with role
    and content as chat templates read them; tools: that the chat may call
    """

    where: str
    form: str
    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[Any, ...] = ()

    @property
    def is_chat(self) -> bool:
        """Whether it has turns."""
        return bool(self.messages)


def read_record(data: Any, where: str, column: str | None = None) -> Record:
    """The record. column: the field that is read, of an object with several. Raises BadCalibration, naming the place."""
    record = _of_column(data, where, column) if column is not None else _record(data, where)
    try:
        for said in (record.text, *(m["content"] for m in record.messages)):
            said.encode("utf-8")
    except UnicodeEncodeError as e:
        half = f"\\u{ord(e.object[e.start]):04x}"
        raise BadCalibration(f"{where}: {half} is one half of a character: export the file again") from None
    return record


def _record(data: Any, where: str) -> Record:
    if isinstance(data, str):
        return Record(where, "text", data)
    if isinstance(data, list):
        return Record(where, "messages", messages=_messages(data, where, "the list"))
    if not isinstance(data, dict):
        raise BadCalibration(f"{where}: expected an object with {FORMS}, found {shown(data, 60)}")
    for read in (_chat, _preference, _instruction, _pair):
        record = read(data, where)
        if record is not None:
            return record
    if data.get("text") is not None:
        return Record(where, "text", _string(data["text"], where, "text"))
    fields = ", ".join(shown(k, 30)[1:-1] for k in list(data)[:8]) or "no field"
    raise BadCalibration(
        f"{where}: expected {FORMS}, found {fields}: name the column to read (FILE:COLUMN), or rename the fields"
    )


def _of_column(data: Any, where: str, column: str) -> Record:
    if not isinstance(data, dict) or column not in data:
        found = ", ".join(shown(k, 30)[1:-1] for k in list(data)[:8]) if isinstance(data, dict) else shown(data, 60)
        raise BadCalibration(f"{where}: there is no column {shown(column, 40)}, found {found}: name one of these")
    value = _decoded(data[column])
    if isinstance(value, list):
        return Record(where, "messages", messages=_messages(value, where, column), tools=_tools(data, where))
    return Record(where, "text", _string(value, where, column))


# ---- chats -------------------------------------------------------------------------------------------------------


def _chat(data: Mapping[str, Any], where: str) -> Record | None:
    """``messages`` or ``conversations``, with a ``system`` prompt and ``tools`` beside them."""
    for name in ("messages", "conversations", "conversation"):
        if data.get(name) is None:
            continue
        turns = _decoded(data[name])
        form = "messages"
        if isinstance(turns, list) and any(isinstance(t, dict) and "from" in t for t in turns):
            form = "ShareGPT conversations"
        messages = _messages(turns, where, name)
        return Record(where, form, messages=_with_system(data, messages, where), tools=_tools(data, where))
    return None


def _preference(data: Mapping[str, Any], where: str) -> Record | None:
    """The chosen answer of a preference pair, behind its prompt where it does not begin with that."""
    if data.get("chosen") is None:
        return None
    chosen, prompt, form = _decoded(data["chosen"]), _decoded(data.get("prompt")), "preference pairs, the chosen answer"
    if isinstance(chosen, dict):
        chosen = [chosen]
    if isinstance(chosen, list):
        messages = _messages(chosen, where, "chosen")
        if all(m["role"] == "assistant" for m in messages):
            messages = (*_question(prompt, where), *messages)
        return Record(where, form, messages=_with_system(data, messages, where))
    answer = _string(chosen, where, "chosen")
    if prompt is None:
        turns = _spoken(answer)
        return Record(where, form, messages=turns) if turns else Record(where, form, answer)
    question = _question(prompt, where)
    messages = (*question, {"role": "assistant", "content": answer})
    return Record(where, form, messages=_with_system(data, messages, where))


def _instruction(data: Mapping[str, Any], where: str) -> Record | None:
    """instruction, input (or context) and output (or response)."""
    if data.get("instruction") is None:
        return None
    answer = next((data[n] for n in ("output", *_ANSWERS) if data.get(n) is not None), None)
    if answer is None:
        raise BadCalibration(f"{where}: an instruction without output: add the answer, or name the column to read")
    parts = [_string(data["instruction"], where, "instruction")]
    parts += [_string(data[n], where, n) for n in ("input", "context") if data.get(n)]
    messages = (
        {"role": "user", "content": "\n\n".join(p for p in parts if p.strip())},
        {"role": "assistant", "content": _string(answer, where, "output")},
    )
    return Record(where, "instruction and output", messages=_with_system(data, messages, where))


def _pair(data: Mapping[str, Any], where: str) -> Record | None:
    """A question and its answer: prompt and completion, strings or turns."""
    question = next((n for n in _QUESTIONS if data.get(n) is not None), None)
    answer = next((n for n in _ANSWERS if data.get(n) is not None), None)
    if question is None or (answer is None and data.get("text") is not None):
        return None
    if answer is None:
        raise BadCalibration(
            f"{where}: a {question} without an answer ({' or '.join(_ANSWERS)}): add it, or name a column"
        )
    turns = _decoded(data[answer])
    turns = [turns] if isinstance(turns, dict) else turns
    answers = (
        _messages(turns, where, answer)
        if isinstance(turns, list)
        else ({"role": "assistant", "content": _string(turns, where, answer)},)
    )
    messages = (*_question(_decoded(data[question]), where), *answers)
    return Record(where, f"{question} and {answer}", messages=_with_system(data, messages, where))


def _question(prompt: Any, where: str) -> tuple[dict[str, Any], ...]:
    if isinstance(prompt, list):
        return _messages(prompt, where, "prompt")
    if prompt is None:
        raise BadCalibration(f"{where}: an answer without a prompt: add the prompt")
    text = _string(prompt, where, "prompt")
    return _spoken(text) or ({"role": "user", "content": text},)


def _spoken(text: str) -> tuple[dict[str, Any], ...]:
    """The turns of a text in which 'Human:' and 'Assistant:' speak; none for another text."""
    if not text.lstrip("\n").startswith("Human:"):
        return ()
    pieces = _TURN.split("\n\n" + text.lstrip("\n"))
    turns = zip(pieces[1::2], pieces[2::2], strict=True)
    return tuple({"role": _ROLES[who.lower()], "content": said.strip()} for who, said in turns if said.strip())


def _with_system(
    data: Mapping[str, Any], messages: tuple[dict[str, Any], ...], where: str
) -> tuple[dict[str, Any], ...]:
    system = next((data[n] for n in ("system", "system_prompt") if data.get(n)), None)
    if system is None or (messages and messages[0]["role"] == "system"):
        return messages
    return ({"role": "system", "content": _string(system, where, "system")}, *messages)


def _messages(turns: Any, where: str, field: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(turns, list):
        raise BadCalibration(f"{where}: {field} is {shown(turns, 60)}, expected a list of turns")
    if not turns:
        raise BadCalibration(f"{where}: {field} has no turns: leave the record out")
    return tuple(_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(turns, 1))


def _turn(turn: Any, where: str) -> dict[str, Any]:
    """role and content, and whatever else a chat template may read (tool_calls, name, reasoning)."""
    if not isinstance(turn, dict):
        raise BadCalibration(f"{where}: expected an object with role and content, found {shown(turn, 60)}")
    shared = "from" in turn and "role" not in turn
    who, said = (turn.get("from"), turn.get("value")) if shared else (turn.get("role"), turn.get("content"))
    role = _ROLES.get(who.strip().lower()) if isinstance(who, str) else None
    if role is None:
        names = "human, gpt, system or tool" if shared else "user, assistant, system or tool"
        raise BadCalibration(f"{where}: {'from' if shared else 'role'} is {shown(who, 40)}, expected {names}")
    if said is None and turn.get("tool_calls"):
        said = ""
    content = "".join(_part(p, where) for p in said) if isinstance(said, list) else said
    if not isinstance(content, str):
        raise BadCalibration(f"{where}: {'value' if shared else 'content'} is {shown(said, 60)}, expected a text")
    more = {} if shared else {k: v for k, v in turn.items() if k not in ("role", "content") and v is not None}
    return {"role": role, "content": content, **more}


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else part
    raise BadCalibration(
        f"{where}: a part of the content is {shown(kind, 40)}, expected a text: image-text data has "
        "image, question and answer on each line"
    )


# ---- fields ------------------------------------------------------------------------------------------------------


def _tools(data: Mapping[str, Any], where: str) -> tuple[Any, ...]:
    tools = _decoded(data.get("tools"))
    if tools in (None, "", []):
        return ()
    if not isinstance(tools, list):
        raise BadCalibration(f"{where}: tools is {shown(tools, 60)}, expected a list")
    return tuple(tools)


def _decoded(value: Any) -> Any:
    """A field of a table that holds JSON, decoded; everything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] == "[" and value.rstrip()[-1:] == "]":
        try:
            decoded = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return decoded if isinstance(decoded, list) and any(isinstance(x, dict) for x in decoded) else value
    return value


def _string(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise BadCalibration(f"{where}: {field} is {shown(value, 60)}, expected a text")
    return value
