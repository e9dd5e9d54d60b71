"""Structured text prompts: the description of a task that the LLM reads (the paper's figure 1)."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path

from llmdpd.errors import InputError, located
from llmdpd.utils.files import check_regular

_MAX_FILE_BYTES = 1_000_000


@dataclass(frozen=True)
class TextPrompt:
    """A task's description, split into the fields of the paper's figure 1 and further ones; empty fields are left out.

    `description` is free text without a heading, put first; a prompt may consist only of it. All other fields are
    rendered as `Heading: value` in the order given here, and `TextPrompt.parse(prompt.render()) == prompt`.

    Raises `InputError` if every field is empty, or if a value contains a line that reads as another field's heading
    (it would not survive being written to a file).
    """

    description: str = ""
    task: str = ""
    objective: str = ""
    constraints: str = ""
    objects: str = ""
    success: str = ""
    actions: str = ""
    observations: str = ""
    rewards: str = ""
    start: str = ""
    end: str = ""
    notes: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str):
                raise InputError("a prompt's field is text", field=field.name, found=type(value).__name__)
            value = _clean(value)
            object.__setattr__(self, field.name, value)
            # The heading itself precedes a value's first line, so that line can't be mistaken for another heading.
            lines = value.split("\n")
            for line in lines if field.name == "description" else lines[1:]:
                if _HEADING.match(line):
                    raise InputError("a line in a prompt's field reads as another field", field=field.name, found=line)
        if not any(getattr(self, field.name) for field in fields(self)):
            raise InputError("empty text prompt", expected="some text, or at least one field such as 'Task: …'")

    def render(self) -> str:
        """The prompt as the LLM reads it: one `Heading: value` a field, without instruction."""
        lines = [self.description] if self.description else []
        lines += [f"{heading}: {getattr(self, name)}" for name, heading in HEADINGS.items() if getattr(self, name)]
        return "\n".join(lines)

    @classmethod
    def parse(cls, text: str) -> TextPrompt:
        """The inverse of `render`; text without any heading is a valid prompt too and becomes `description`.

        Raises `InputError` on an empty text or a field that is given twice.
        """
        names = {heading: name for name, heading in HEADINGS.items()}
        values: dict[str, list[str]] = {"description": []}
        current = "description"
        for line in _clean(text).split("\n"):
            match = _HEADING.match(line)
            if match is None:
                values[current].append(line)
                continue
            current = names[match.group(1)]
            if current in values:
                raise InputError("a prompt's field is given twice", field=match.group(1), found=line)
            values[current] = [line[match.end() :]]
        return cls(**{name: "\n".join(lines) for name, lines in values.items()})

    @classmethod
    def from_file(cls, path: str | Path) -> TextPrompt:
        """Read a UTF-8 text file: fields as `render` writes them, or free text. Raises `InputError` naming the file."""
        path = Path(path)
        check_regular(path, "a text prompt")
        try:
            data = path.read_bytes() if path.stat().st_size <= _MAX_FILE_BYTES else None
        except OSError as error:
            raise InputError("cannot read the text prompt", path=path, found=error.strerror or str(error)) from None
        if data is None:
            raise InputError("too large for a text prompt", path=path, expected=f"at most {_MAX_FILE_BYTES} bytes")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError("not a text file", path=path, found=str(error), expected="UTF-8 text") from None
        if "\0" in text:
            raise InputError("not a text file", path=path, found="a zero byte", expected="UTF-8 text")
        with located(path):
            return cls.parse(text)


HEADINGS = {field.name: field.name.capitalize() for field in fields(TextPrompt) if field.name != "description"}
_HEADING = re.compile(rf"({'|'.join(HEADINGS.values())}):(?: |$)")


def _clean(text: str) -> str:
    """Unify line ends and drop white space at line ends and around the text: it has no meaning, and files vary."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "\n".join(line.rstrip() for line in lines).strip()
