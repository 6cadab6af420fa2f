"""Names of classes, domains and methods are drawn letter by letter: none is read as a formula or hidden."""

import pytest
from matplotlib.text import Text
from test_report import make

from experiments.results import figures
from experiments.results.style import png

NAMES = ("$x^", "$x^$", r"\$", r"\$y\$", r"$\frac$", "$$", "_hidden", "a_b^c", r"\alpha", "{", "%s", "#&~", "$")


@pytest.mark.long
@pytest.mark.parametrize("first", [0, len(NAMES) - 9])
def test_names_that_look_like_mathematics_are_drawn_as_they_are(first):
    names = NAMES[first : first + 9]
    summary, rows, holdings = make(names=names[:2], domains=names[2:5], classes=4, seeds=1, rounds=2, every=1)
    holdings["classes"] = list(names[5:])
    drawn = set()
    for figure in figures.draw(summary, rows, holdings).values():
        png(figure)
        for text in figure.findobj(Text):
            shown, formula = text._preprocess_math(text.get_text())  # type: ignore[attr-defined]
            assert not formula or shown.startswith(r"$\mathdefault{10^{"), shown  # a power of ten beside an axis
            drawn.add(shown.strip())
    assert set(names) <= drawn
