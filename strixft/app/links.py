"""Links to files of a run, as JupyterLab's pages need them."""

from __future__ import annotations

from html import escape
from pathlib import Path
from urllib.parse import quote

from strixft.support import html


def _server_of(path: Path) -> tuple[str, Path] | None:
    """Return the base address of the Jupyter server that shows a file, and its path there."""
    from jupyter_server.serverapp import list_running_servers

    for server in list_running_servers():
        root = Path(server["root_dir"])
        if path.is_relative_to(root):
            return server["base_url"], path.relative_to(root)
    return None


def file_link(path: Path, text: str) -> html.Markup:
    """Link to a file in an output of a cell, which JupyterLab resolves from the server's folder."""
    found = _server_of(path)
    return html.link(f"/{quote(found[1].as_posix())}", text) if found else html.Markup(text)


def widget_link(path: Path, text: str, *, is_download: bool = False) -> html.Markup:
    """Link to a file in a widget, whose addresses nobody resolves; its path if nobody serves it.

    Args:
        path: The file.
        text: What to show.
        is_download: The browser saves the file in place of showing it.
    """
    found = _server_of(path)
    if found is None or not path.is_file():
        return html.Markup(escape(str(path)))
    base, place = found
    url = f"{base}files/{quote(place.as_posix())}"
    if not is_download:
        return html.Markup(
            f'<a href="{escape(url)}" target="_blank" style="text-decoration: underline">'
            f"{escape(text)}</a>"
        )
    return html.Markup(
        f'<a href="{escape(url)}?download=1" download="{escape(path.name)}"'
        f' class="sx-download" style="text-decoration: underline">{escape(text)}</a>'
    )
