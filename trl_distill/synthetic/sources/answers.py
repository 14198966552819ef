"""Reads the answers of OpenAI-compatible endpoints, of which there are many kinds.

What comes out is a text with the reason why it ended, in our words, or an error that says what is missing. Asking, and
asking again, is left to `endpoint.py`.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ...http_client import PassingError, StatusError
from ...http_messages import error_inside, may_pass
from ..records import Completion


STOP = {  # an end of its own, as OpenAI, vLLM, TGI, Anthropic, Cohere, Together and others say it
    *("stop", "stopsequence", "stopsequences", "stopstring", "stoptoken", "stopword", "stopwords", "eos", "eostoken"),
    *("endturn", "endofturn", "endoftext", "endofsequence", "eot", "end", "complete", "completed", "finished", "done"),
}


LENGTH = {
    *("length", "maxlength", "maxtokens", "maxnewtokens", "maxoutputtokens", "tokenlimit", "limit", "modellength"),
    *("modelcontextwindowexceeded", "contextlength", "contextlengthexceeded", "maxcontextlength", "incomplete"),
}


BROKEN = {"error", "abort", "aborted", "cancelled", "canceled", "timeout"}  # the server failed; it may not fail again


NOTHING = {"", "null", "none", "unknown", "unspecified"}


TEXT_PARTS = (None, "text", "output_text")


THOUGHT_PARTS = ("thinking", "reasoning", "reasoning_content", "redacted_thinking")


class UnusableError(PassingError):
    """An answer came, but there is no completion in it. The next one may have one."""


class ErrorInsideError(StatusError):
    """An answer with status 200 holds an error, and another attempt would, too."""


def read_completions(url: str, content: bytes) -> list[Completion]:
    """
    The completions in an answer with status 200, at least one; choices that cannot be used are left out.

    Raises:
        UnusableError: there is none; another attempt may succeed.
        ErrorInsideError: the answer holds an error with a status after which none would.
    """
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        raise UnusableError(f"{url} answered with something that is not JSON: {content[:100_000]!r}") from None
    if error := error_inside(answer):
        message, status = error
        said = f"{url} answered HTTP 200 with an error in it: {message}"
        if status is None or may_pass(status):
            raise UnusableError(said)
        raise ErrorInsideError(said, status)
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices:
        raise UnusableError(f"{url} answered without a completion: {json.dumps(answer)}")
    found, faults = list[Completion](), list[str]()
    for choice in choices:
        try:
            found.append(_completion(choice))
        except ValueError as error:
            faults.append(str(error))
    if not found:
        raise UnusableError(f"{url} gave no completion that can be used ({faults[0]}): {json.dumps(answer)}")
    return found


def _completion(choice: Any) -> Completion:
    """One choice. Raises `ValueError` with what is wrong with it."""
    if not isinstance(choice, dict):
        raise ValueError("a choice is not an object")
    reason = end_of(choice.get("finish_reason"))
    if choice.get("error") or reason == "error":
        raise ValueError("a choice holds an error")
    if reason is None:
        raise ValueError("no `finish_reason` says whether it is whole")
    message, text, reasoning = choice.get("message"), choice.get("text"), ""
    if isinstance(message, dict):
        reasoning = _reasoning(message)
        text = _text(message.get("content"))
        if text is None and message.get("refusal"):
            reason = "refusal"
        elif text is None and any(message.get(name) for name in ("tool_calls", "reasoning_content", "reasoning")):
            text = ""  # all that was written stands beside the text
    if text is None and reason not in ("stop", "length"):
        text = ""  # a filter or the like took it away, and would again
    if not isinstance(text, str):
        raise ValueError("a choice has no text")
    return Completion(text.encode(errors="replace").decode(), reason, reasoning or None)


def _reasoning(message: dict[str, Any]) -> str:
    """What a message gives beside its text: as a field (vLLM, SGLang, DeepSeek, OpenRouter), or as parts of it."""
    said = [message.get(name) for name in ("reasoning_content", "reasoning")]
    parts = message.get("content")
    for part in parts if isinstance(parts, list) else [parts]:
        if isinstance(part, dict) and part.get("type") in THOUGHT_PARTS:
            said += [part.get(name) for name in ("thinking", "reasoning", "reasoning_content", "text")]
    texts = [text for text in said if isinstance(text, str) and text.strip()]
    return "\n\n".join(dict.fromkeys(texts)).encode(errors="replace").decode()


def _text(content: Any) -> str | None:
    """The text of a message's content, of parts without thoughts; `None` where there is none, or something else."""
    if content is None or isinstance(content, str):
        return content
    parts = [content] if isinstance(content, dict) else content
    if not isinstance(parts, list) or not parts:
        return None
    said = [_part(part) for part in parts]
    return None if None in said else "".join(map(str, said))


def _part(part: Any) -> str | None:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        return None
    if part.get("type") in THOUGHT_PARTS:
        return ""
    text = part.get("text") if part.get("type") in TEXT_PARTS else None
    return text if isinstance(text, str) else None


def end_of(reason: Any) -> str | None:
    """
    Why a completion ended: "stop", "length", "error" where the server failed, or the endpoint's own word.

    Args:
        reason: its `finish_reason`.

    Returns:
        `str`, *optional*: `None` if it does not say.
    """
    if isinstance(reason, dict):
        reason = reason.get("type")
    if not isinstance(reason, str | int):
        return None
    name = re.sub(r"[^a-z]", "", str(reason).rpartition(".")[2].casefold()).removeprefix("finishreason")
    if name in NOTHING and not str(reason).strip().isdecimal():
        return None
    known = (("stop", STOP), ("length", LENGTH), ("error", BROKEN))
    return next((ours for ours, theirs in known if name in theirs), str(reason))
