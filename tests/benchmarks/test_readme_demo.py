from __future__ import annotations

import pytest

from benchmarks.readme_demo import BEGIN, END, README, as_a_terminal_shows, with_output


def test_a_progress_bar_shows_its_last_state() -> None:
    output = (
        "start\n\r  0%|    | 0/2\r 50%|##  | 1/2\r          \r{'loss': 1}\n\r100%|####| 2/2\nend\n"
    )
    assert as_a_terminal_shows(output) == "start\n{'loss': 1}\n100%|####| 2/2\nend"


def test_empty_lines_inside_stay() -> None:
    assert as_a_terminal_shows("\na\n\nb\n\n") == "a\n\nb"


def test_output_replaces_what_stood_between_the_markers() -> None:
    readme = f"# Title\n{BEGIN}\nold\n{END}\nrest\n"
    once = with_output(readme, "new")
    assert once == f"# Title\n{BEGIN}\n```text\n$ hf-dp demo\nnew\n```\n{END}\nrest\n"
    assert with_output(once, "new") == once


@pytest.mark.parametrize("readme", ["", f"{BEGIN} only", f"{BEGIN}{END}{BEGIN}{END}"])
def test_markers_must_be_there_once(readme: str) -> None:
    with pytest.raises(ValueError, match="expected one"):
        with_output(readme, "new")


def test_the_readme_shows_a_run_of_the_demo() -> None:
    readme = README.read_text("utf-8")
    shown = readme.partition(BEGIN)[2].partition(END)[0]
    assert "$ hf-dp demo" in shown
    assert "epsilon <= " in shown
    assert "Took " in shown
