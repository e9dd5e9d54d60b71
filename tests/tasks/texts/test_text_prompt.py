from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from llmdpd.errors import InputError
from llmdpd.tasks.texts.text_prompt import TextPrompt

FIELDS = [field.name for field in fields(TextPrompt)]
# Letters that make headings, line ends and white space of every kind likely.
VALUES = st.text(st.sampled_from("Task:Objective \n\r\tà×") | st.characters(codec="utf-8"), max_size=40)


def test_render_is_the_papers_figure_1() -> None:
    prompt = TextPrompt(
        task="Meta-World push.", objective="Push the puck to a goal.", constraints="Randomize puck and goal positions."
    )
    assert prompt.render() == (
        "Task: Meta-World push.\nObjective: Push the puck to a goal.\nConstraints: Randomize puck and goal positions."
    )


@given(st.dictionaries(st.sampled_from(FIELDS), VALUES))
def test_parse_inverts_render(values: dict[str, str]) -> None:
    try:
        prompt = TextPrompt(**values)
    except InputError:
        reject()  # refusals have tests of their own
    assert TextPrompt.parse(prompt.render()) == prompt


def test_free_text_is_a_prompt_and_rendered_as_it_is() -> None:
    text = "Please push\n\n  the puck: gently."
    prompt = TextPrompt.parse(text)
    assert prompt == TextPrompt(description=text)
    assert prompt.render() == text
    parsed = TextPrompt.parse("Intro.\nTask: one\nHint: two\n\nObjective: three")
    assert parsed == TextPrompt(description="Intro.", task="one\nHint: two", objective="three")


def test_from_file(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes("\ufeffTask: stoße\r\nObjective: b \r\n".encode())
    assert TextPrompt.from_file(path) == TextPrompt(task="stoße", objective="b")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "empty text prompt"),
        (b"\xff\xfe\x00", "not a text file"),
        (b"Task: a\x00b", "not a text file"),
        (b"Task: a\nTask: b", "given twice"),
        (b"x" * 1_000_001, "too large"),
        (None, "not found"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=problem) as caught:
        TextPrompt.from_file(path)
    assert caught.value.path == str(path)


@pytest.mark.parametrize(
    ("make", "problem", "field"),
    [
        *[(lambda text=text: TextPrompt.parse(text), "empty text prompt", None) for text in ("", " \n\t ", "Task:\n")],
        (lambda: TextPrompt.parse("Task: a\nObjective: b\nTask: c"), "given twice", "Task"),
        (lambda: TextPrompt(objective="Push.\nTask: another"), "reads as another field", "objective"),
        (lambda: TextPrompt(description="Task: a"), "reads as another field", "description"),
        (lambda: TextPrompt(task=3), "field is text", "task"),  # type: ignore[arg-type]
    ],
)
def test_wrong_prompts_are_refused(make: Callable[[], TextPrompt], problem: str, field: str | None) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        make()
    assert caught.value.field == field
    # In a value's first line nothing can be mistaken: the value's own heading stands before it.
    assert TextPrompt.parse(TextPrompt(notes="Task: a").render()).notes == "Task: a"
