"""Condensing Markdown documentation into plain sentences: tables, lists, formulas and code made short or dropped."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from itertools import accumulate, groupby, takewhile
from typing import NamedTuple

_MAX_TABLE_PIECES = 115
_PIECE = re.compile(r"\w+|[^\w\s]")

_FENCE = re.compile(r"^\s*```.*?^\s*```\s*$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^\s*#{2,3}\s+(.+?)\s*$")
_SUBHEADING = re.compile(r"^\s*#{3}")
_RULE = re.compile(r"^[\s|:+-]+$")
_LIST_MARK = re.compile(r"^\s*([-*+]|\d+[.)])\s+")
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+(?=[A-Z0-9\"'(\[])")
_ABBREVIATION = re.compile(r"\b(e\.g|i\.e|cf|vs|al|Fig|Eq|[A-Z])\.$")
_TAG = re.compile(r"<(/?)(\w+)[^<>]*>")
_LINK = re.compile(r"!?\[([^\]]*)\]\((?:[^()]|\([^()]*\))*\)")
_FRACTION = re.compile(r"\\frac\{([^{}]*)\}\{([^{}]*)\}")
_COMMAND = re.compile(r"\\(mathcal|mathbf|text|textrm|mathrm|left|right|,|;|!)\s*")
_SYMBOLS = {r"\times": "x", r"\cdot": "x", r"\infty": "inf", r"\pi": "pi", r"\theta": "theta", r"\|": "|", r"\_": "_"}
_UNBOUNDED = re.compile(r"^[-+]?inf(inity)?$", re.IGNORECASE)


def sections(documentation: str) -> dict[str, str]:
    """Split Markdown at its `##` headings: lower-case heading without colon → text; "" for what comes before any.

    `###` headings stay inside their section, as the sentence's beginning ("Termination: …").
    """
    text = _FENCE.sub("", inspect.cleandoc(documentation))
    parts: dict[str, list[str]] = {"": []}
    current = ""
    for line in text.split("\n"):
        match = _HEADING.match(line)
        if match is None:
            parts[current].append(line)
        elif _SUBHEADING.match(line):
            parts[current] += ["", f"{match.group(1).rstrip(':')}:"]
        else:
            current = match.group(1).rstrip(": ").lower()
            parts.setdefault(current, [])
    return {heading: body for heading, lines in parts.items() if (body := "\n".join(lines).strip())}


def condense(text: str, words: int | None = None) -> str:
    """One line of plain text from a Markdown section; prose is cut to `words` at whole sentences, a table is not.

    Of a section with a table, the result is the first table, preceded by the part of the first sentence before a colon
    if that fits: the rest of the prose mostly repeats the table.
    """
    prose, tables = _split_tables(text)
    plain = _plain(prose)
    lists = [listed for rows in tables if (listed := _table(rows))]
    if not lists or words is None:
        return " ".join([plain if words is None else first_words(plain, words), *lists]).strip()
    lead = sentences(plain)[:1]
    lead = [sentence.split(": ")[0].rstrip(".:") + "." for sentence in lead]
    return " ".join([*(sentence for sentence in lead if len(sentence.split()) <= words), lists[0]])


def sentences(text: str) -> list[str]:
    """Split plain text into its sentences."""
    found: list[str] = []
    for part in _SENTENCE_END.split(text):
        if found and _ABBREVIATION.search(found[-1]):
            found[-1] += f" {part}"
        elif part.strip():
            found.append(part.strip())
    return found


def first_words(text: str, words: int) -> str:
    """The leading whole sentences of at most `words` words; of a longer first sentence, its beginning and `…`."""
    found = sentences(text)
    lengths = accumulate(len(sentence.split()) for sentence in found)
    kept = [sentence for sentence, length in zip(found, lengths, strict=True) if length <= words]
    if found and not kept:
        kept = [" ".join(found[0].split()[:words]) + " …"]
    return " ".join(kept).rstrip(";")


def _split_tables(text: str) -> tuple[str, list[list[list[str]]]]:
    prose: list[str] = []
    tables: list[list[list[str]]] = []
    for is_table, lines in groupby(text.split("\n"), lambda line: line.strip().startswith("|")):
        if is_table:
            rows = [line.strip().strip("|").split("|") for line in lines if not _RULE.match(line)]
            tables.append([[_plain(cell) for cell in row] for row in rows])
        else:
            prose += lines
    return "\n".join(prose), tables


class _Row(NamedTuple):
    number: str
    words: tuple[str, ...]
    detail: str
    """Unit and bounds, ready to be printed."""


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A table with a header as a list of at most 115 words and signs, what neighbours share given once.

    `0 height of the torso (m); 1-3 angle of the (rad): torso, thigh joint, leg joint; and 5 more.`
    """
    header = [cell.lower() for cell in rows[0]]
    low, high, unit = (_column(header, word) for word in ("min", "max", "unit"))
    body = [row for row in rows[1:] if len(row) == len(header) > 1 and row[0][:1].isdigit()]
    bounds = [(row[low], row[high]) if low is not None and high is not None else ("", "") for row in body]
    shared = len(set(bounds)) == 1
    entries = []
    for row, (lower, upper) in zip(body, bounds, strict=True):
        details = [_unit(row[unit])] if unit is not None else []
        if not shared and not (_UNBOUNDED.match(lower) and _UNBOUNDED.match(upper)):
            details.append(f"{lower} to {upper}")
        entries.append(_Row(row[0], tuple(row[1].split()), f" ({', '.join(details)})" if any(details) else ""))
    for count in range(len(entries), 0, -1):
        parts = [_row_text(group) for group in _groups(entries[:count])]
        if count < len(entries):
            parts.append(f"and {len(entries) - count} more")
        listed = "; ".join(parts) + "."
        if len(_PIECE.findall(listed)) <= _MAX_TABLE_PIECES:
            return listed
    return ""


def _groups(rows: Sequence[_Row]) -> list[list[_Row]]:
    """Neighbouring rows of equal detail whose texts begin with the same two words or more."""
    groups: list[list[_Row]] = []
    for row in rows:
        if groups and groups[-1][-1].detail == row.detail and _common([*groups[-1], row]) >= 2:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _row_text(group: Sequence[_Row]) -> str:
    first = group[0]
    if len(group) == 1:
        return f"{first.number} {' '.join(first.words)}{first.detail}"
    shared = _common(group)
    rests = ", ".join(" ".join(row.words[shared:]) for row in group)
    return f"{first.number}-{group[-1].number} {' '.join(first.words[:shared])} {rests}{first.detail}"


def _common(rows: Sequence[_Row]) -> int:
    """How many leading words all rows share, leaving each at least one of its own."""
    columns = zip(*(row.words[:-1] for row in rows), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _column(header: Sequence[str], word: str) -> int | None:
    return next((index for index, cell in enumerate(header) if word in cell), None)


def _unit(cell: str) -> str:
    """`angular velocity (rad/s)` → `rad/s`: the quantity's name is in the row's description already."""
    match = re.search(r"\(([^()]*)\)\s*$", cell)
    return match.group(1) if match else cell


def _plain(text: str) -> str:
    """Markdown's marks and simple LaTeX taken out; lists, line breaks and paragraphs joined into one line."""
    paragraphs = [plain for part in re.split(r"\n\s*\n", text) if (plain := _plain_paragraph(part))]
    # A paragraph's end is a sentence's end, whether or not it has a full stop.
    joined = [part if part[-1] in ".!?:;" or part is paragraphs[-1] else f"{part}." for part in paragraphs]
    return " ".join(joined)


def _plain_paragraph(text: str) -> str:
    lines = [f"; {line[mark.end() :]}" if (mark := _LIST_MARK.match(line)) else line for line in text.split("\n")]
    text = _LINK.sub(r"\1", " ".join(lines))
    text = _TAG.sub(lambda tag: "^" if tag.group(2) == "sup" and not tag.group(1) else "", text)
    text = _FRACTION.sub(r"\1/\2", text)
    for command, symbol in _SYMBOLS.items():
        text = text.replace(command, symbol)
    text = _COMMAND.sub("", text)
    text = re.sub(r"[*`$]|(?<!\w)_|_(?!\w)", "", text)
    text = re.sub(r"[_^]?\{([^{}]*)\}", r" \1", text) if "\\" not in text else text
    text = re.sub(r"([.:,;])\s*;", r"\1", re.sub(r"\s+", " ", text))
    return re.sub(r"\s+([.,;:])", r"\1", text).strip("; ").strip()
