"""No text from data, models or recipes becomes markup."""

from strixft import views

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
