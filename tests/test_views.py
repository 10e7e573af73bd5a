"""No text from data, models or recipes becomes markup."""

from pathlib import Path

import pytest

from strixft import views
from strixft.errors import HostError

HOSTILE = "<script>alert('1')</script>&\""
ESCAPED = "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;&amp;&quot;"


def test_a_cell_is_escaped() -> None:
    html = views.table([[HOSTILE]])
    assert html == f'<table class="sx"><tr><td>{ESCAPED}</td></tr></table>'


def test_a_header_is_escaped() -> None:
    html = views.table([], [HOSTILE])
    assert html == f'<table class="sx"><tr><th>{ESCAPED}</th></tr></table>'


def test_a_name_and_its_value_are_escaped() -> None:
    assert views.mapping({HOSTILE: [HOSTILE]}).count("&lt;script&gt;") == 2
    assert "<script>" not in views.mapping({HOSTILE: [HOSTILE]})


def test_a_note_is_escaped() -> None:
    assert views.note(HOSTILE) == f"<p>{ESCAPED}</p>"


def test_a_warning_is_escaped() -> None:
    assert views.warning(HOSTILE) == f'<p class="sx-warning">⚠ {ESCAPED}</p>'


def test_the_text_beside_a_picture_cannot_leave_its_attribute() -> None:
    figure, _ = views.new_figure()
    html = views.picture(figure, '" onload="alert(1)')
    assert 'alt="&quot; onload=&quot;alert(1)"' in html


def test_a_picture_is_inside_the_page() -> None:
    figure, _ = views.new_figure()
    assert 'src="data:image/png;base64,iVBORw0KGgo' in views.picture(figure, "empty axes")


def test_a_page_is_written_over_a_page_of_ours_alone(tmp_path: Path) -> None:
    page = views.page("A title", "", "body")
    assert views.write_page(tmp_path / "a.html", page).read_text() == page
    assert views.write_page(tmp_path / "a.html", views.page("B", "", "")).is_file()
    (tmp_path / "recipe.yaml").write_text("model: m\n")
    with pytest.raises(HostError, match=r"recipe\.yaml exists and is no page of strixft"):
        views.write_page(tmp_path / "recipe.yaml", page)
    assert (tmp_path / "recipe.yaml").read_text() == "model: m\n"


@pytest.mark.parametrize("place", ["", "missing/a.html"])
def test_a_page_that_cannot_be_written_says_where(tmp_path: Path, place: str) -> None:
    with pytest.raises(HostError, match="cannot be written") as caught:
        views.write_page(tmp_path / place, "page")
    assert "mkdir -p" in caught.value.fix
