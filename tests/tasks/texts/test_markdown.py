from __future__ import annotations

import pytest

from llmdpd.tasks.texts.markdown import condense, first_words, sections, sentences

TABLE = """
The space is a `Box(-1, 1, (4,))` where: much follows.

| Num | Observation        | Min  | Max | Type (Unit)  |
|-----|--------------------|------|-----|--------------|
| 0   | height             | -Inf | Inf | position (m) |
| 1   | angle of the knee  | -Inf | Inf | angle (rad)  |
| 2   | angle of the ankle | -Inf | Inf | angle (rad)  |
| 3   | speed              | -2   | 2   | speed (m/s)  |
| excluded | x             | -Inf | Inf | position (m) |
"""


def test_sections() -> None:
    text = """
    Before.

    ## Action Space
    One.
    ```python
    ## not a heading
    ```
    ## Rewards:
    ### Bonus
    Two.
    ## Empty
    """
    assert sections(text) == {"": "Before.", "action space": "One.", "rewards": "Bonus:\nTwo."}


def test_tables_become_lists() -> None:
    expected = "0 height (m); 1-2 angle of the knee, ankle (rad); 3 speed (m/s, -2 to 2)."
    assert condense(TABLE, 30) == f"The space is a Box(-1, 1, (4,)) where. {expected}"
    assert condense(TABLE, 3) == expected


def test_long_tables_are_cut_and_say_so() -> None:
    rows = "\n".join(f"| {row} | {chr(97 + row % 26)}{row} rises |" for row in range(300))
    told = condense(f"| Num | What |\n|---|---|\n{rows}", 10)
    shown = told.count("rises")
    assert 20 < shown < 60
    assert told.endswith(f"; and {300 - shown} more.")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("a *b* **c** `d_e` _f_", "a b c d_e f"),
        ("see [this](http://x.org/y_(z)) now", "see this now"),
        (r"$w \times \frac{dx}{dt}$", "w x dx/dt"),
        (r"$-\infty$ to $\mathcal{U}$", "-inf to U"),
        ("x<sup>2</sup> and <br/> more", "x^2 and more"),
        ("- one\n- two", "one; two"),
        ("Items:\n\n1. one\n2. two", "Items: one; two"),
        ("no stop\n\nNext.", "no stop. Next."),
    ],
)
def test_marks_are_taken_out(text: str, plain: str) -> None:
    assert condense(text) == plain


def test_sentences() -> None:
    text = "It is by P. Smith in 1990. See e.g. Figure 1! Done? yes; No."
    assert sentences(text) == ["It is by P. Smith in 1990.", "See e.g. Figure 1!", "Done? yes;", "No."]


def test_first_words_keeps_whole_sentences() -> None:
    text = "One two three. Four five. Six."
    assert first_words(text, 5) == "One two three. Four five."
    assert first_words(text, 4) == "One two three."
    assert first_words(text, 2) == "One two …"
    assert first_words("", 5) == ""
