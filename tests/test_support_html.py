"""No text from data, models or recipes becomes markup."""

import os
import resource
from pathlib import Path

import pytest

from strixft.support import html
from strixft.support.errors import HostError

HOSTILE = "<script>alert('1')</script>&\""
ESCAPED = "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;&amp;&quot;"


def test_a_cell_is_escaped() -> None:
    markup = html.table([[HOSTILE]])
    assert markup == f'{html.LEFT}<table class="sx"><tr><td>{ESCAPED}</td></tr></table>'


def test_a_header_is_escaped() -> None:
    markup = html.table([], [HOSTILE])
    assert markup == f'{html.LEFT}<table class="sx"><tr><th>{ESCAPED}</th></tr></table>'


def test_a_name_and_its_value_are_escaped() -> None:
    assert html.mapping({HOSTILE: [HOSTILE]}).count("&lt;script&gt;") == 2
    assert "<script>" not in html.mapping({HOSTILE: [HOSTILE]})


def test_a_note_is_escaped() -> None:
    assert html.note(HOSTILE) == f"<p>{ESCAPED}</p>"


def test_a_warning_is_escaped() -> None:
    assert html.warning(HOSTILE) == f'<p class="sx-warning">⚠ {ESCAPED}</p>'


def test_the_text_beside_a_picture_cannot_leave_its_attribute() -> None:
    figure, _ = html.new_figure()
    markup = html.picture(figure, '" onload="alert(1)')
    assert 'alt="&quot; onload=&quot;alert(1)"' in markup


def test_a_picture_is_inside_the_page() -> None:
    figure, _ = html.new_figure()
    assert 'src="data:image/png;base64,iVBORw0KGgo' in html.picture(figure, "empty axes")


def test_a_page_is_written_over_an_older_one(tmp_path: Path) -> None:
    page = html.page("A title", "", "body")
    assert html.write_page(tmp_path / "a.html", page).read_text() == page
    newer = html.page("B", "", "")
    assert html.write_page(tmp_path / "a.html", newer).read_text() == newer


@pytest.mark.parametrize("text", ["", "model: m\n", f"My notes quote {html.START}\n"])
def test_a_file_that_is_no_page_of_ours_stays(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.html"
    path.write_text(text)
    (tmp_path / "notes-2.html").touch()
    with pytest.raises(HostError) as caught:
        html.write_page(path, html.page("A title", "", ""))
    assert caught.value.problem == f"{path} exists and is not a page of strixft"
    assert caught.value.fix == f"--page {tmp_path / 'notes-3.html'}"
    assert path.read_text() == text


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(HostError, match="is not a page of strixft") as caught:
        html.write_page(tmp_path / "pipe", "page")
    assert caught.value.fix == f"--page {tmp_path / 'pipe-2'}"


def test_a_page_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder, no_folder, file = (tmp_path / name for name in ("", "missing/a.html", "file/a.html"))
    for place, problem, fix in (
        (folder, f"{tmp_path} is a folder", f"--page {tmp_path / 'page.html'}"),
        (
            no_folder,
            f"there is no folder {tmp_path / 'missing'}",
            f"mkdir -p {tmp_path / 'missing'}   and run the command again",
        ),
        (file, f"{tmp_path / 'file'} is not a folder", "--page a.html   writes it here"),
    ):
        with pytest.raises(HostError) as caught:
            html.write_page(place, "page")
        assert (caught.value.problem, caught.value.fix) == (problem, fix)


def test_a_page_that_breaks_off_leaves_the_older_one_and_no_half(tmp_path: Path) -> None:
    older = html.page("A title", "", "body")
    path = html.write_page(tmp_path / "a.html", older)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(older), before[1]))
    try:
        with pytest.raises(HostError, match="cannot be written: File too large"):
            html.write_page(path, html.page("B", "", "body" * 10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == older
    assert list(tmp_path.iterdir()) == [path]


def test_a_page_whose_name_is_too_long_is_told(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot be written: File name too long") as caught:
        html.write_page(tmp_path / ("a" * 300), "page")
    assert caught.value.fix.startswith(f"ls -ld {tmp_path}   shows whose it is")
