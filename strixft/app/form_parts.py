"""Parts of the form: the list of models, and the ways to name data."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets

from strixft.app.cards import settings_in, shown_error
from strixft.app.choices import ANY_MODEL, DATA, Offer, is_on_disk, keep_upload, offers
from strixft.formats.sources import FILE_KINDS, HUB, data_files
from strixft.recipe.find import workspace
from strixft.support.errors import DataError, StrixftError
from strixft.support.text import visible
from strixft.support.units import GIB

UPLOAD, PICK, ON_HUB, OWN = (
    "Upload a file",
    "A file here",
    "Hugging Face dataset",
    "The recipe's own",
)


Settings = dict[str, Any]
"""By dotted key."""


def heading(number: int, title: str, text: str) -> ipywidgets.HTML:
    """Return the head of a section."""
    words = f"<h3><span>{number}</span>{escape(title)}<small>{escape(text)}</small></h3>"
    return ipywidgets.HTML(words).add_class("sx-head")


def note(text: str) -> str:
    """Return a small paragraph; the text is escaped."""
    return f'<p class="sx-note">{escape(visible(text))}</p>'


def section(*children: Any) -> ipywidgets.VBox:
    """Return a framed part of the form."""
    return ipywidgets.VBox(list(children)).add_class("sx-section")


def row(*children: Any) -> ipywidgets.Box:
    """Return widgets beside each other, which wrap where the window is narrow."""
    return ipywidgets.Box(list(children)).add_class("sx-row")


class ModelSection:
    """The recipes as a list of models, another model by name, and the login for gated ones.

    Args:
        chosen: Called with the recipe's name, and the model if it is another one.
    """

    def __init__(self, chosen: Callable[[str, str | None], None]) -> None:
        self._chosen, self._quiet = chosen, threading.RLock()
        self._is_quiet = False
        self._offers = offers()
        self._budget_bytes: int | None = None
        self.cards = ipywidgets.ToggleButtons().add_class("sx-models")
        self.find = ipywidgets.Text(placeholder="find a model", continuous_update=True)
        self.find.layout.width = "13rem"
        self.other = ipywidgets.Text(placeholder="another model: owner/name, or a folder")
        self.other.layout.width, self.other.continuous_update = "21rem", False
        self.take = ipywidgets.Button(description="Use it")
        self.about = ipywidgets.HTML()
        self.token = ipywidgets.Password(placeholder="hf_…")
        self.token.layout.width = "15rem"
        self.log_in = ipywidgets.Button(description="Log in", icon="key")
        self.login_text = ipywidgets.HTML()
        self.login = ipywidgets.VBox([self.login_text, row(self.token, self.log_in)])
        self.login.layout.display = "none"
        self._list()
        self.cards.observe(self._card, "value")
        self.find.observe(lambda _: self._list(), "value")
        self.take.on_click(lambda _: self._other())
        self.log_in.on_click(lambda _: self._log_in())
        self.box = section(
            heading(1, "Model", "memory and time as planned for 128 GB, in bf16 or 4 bits"),
            row(self.find, self.other, self.take),
            self.cards,
            self.about,
            self.login,
        )

    def offer(self, recipe: str) -> Offer | None:
        """Return the row of a recipe, or None."""
        return next((one for one in self._offers if one.recipe == recipe), None)

    def show(self, recipe: str) -> None:
        """Mark a recipe without choosing it."""
        is_shown = any(one.recipe == recipe for one in self._shown())
        with self._without_choosing():
            self.cards.value = recipe if is_shown else None

    def set_budget(self, num_bytes: int) -> None:
        """Say of each model whether it fits into this."""
        self._budget_bytes = num_bytes
        self._list()

    def _shown(self) -> list[Offer]:
        words = self.find.value.lower().split()
        texts = {one: f"{one.recipe} {one.model} {one.method}".lower() for one in self._offers}
        return [one for one, text in texts.items() if all(word in text for word in words)]

    def _list(self) -> None:
        shown = self._shown()
        with self._without_choosing():
            before = self.cards.value
            self.cards.options = [(one.label(self._budget_bytes), one.recipe) for one in shown]
            self.cards.value = before if any(one.recipe == before for one in shown) else None

    @contextlib.contextmanager
    def _without_choosing(self) -> Iterator[None]:
        """Change the cards; a choice that a person makes meanwhile waits, and counts."""
        with self._quiet:
            self._is_quiet = True
            try:
                yield
            finally:
                self._is_quiet = False

    def _card(self, change: Any) -> None:
        with self._quiet:
            is_quiet = self._is_quiet
        if not is_quiet and change["new"] is not None:
            self._chosen(change["new"], None)

    def _other(self) -> None:
        name = self.other.value.strip()
        if not name:
            return
        known = next((one.recipe for one in self._offers if one.model == name), None)
        self.show(known or "")
        is_folder = os.path.isdir(os.path.expanduser(name))
        model = os.path.realpath(os.path.expanduser(name)) if is_folder else name
        self._chosen(known or ANY_MODEL, None if known else model)

    def describe(self, model: str, text: str, *, is_enough: bool) -> None:
        """Show where the model comes from, and the disk that it needs."""
        warning = "" if is_enough else shown_error(DataError(text, fix="make room, or set HF_HOME"))
        self.about.value = warning or note(f"{model}: {text}")
        is_gettable = not is_on_disk(model) and not os.path.isdir(model)
        self.login.layout.display = "" if is_gettable else "none"
        page = f"https://huggingface.co/{escape(model, quote=True)}"
        self.login_text.value = (
            '<p class="sx-note">Some models are gated. Open '
            f'<a href="{page}" target="_blank" rel="noopener">the model\'s page</a>, log in there'
            " and press <b>Agree and access repository</b>; make a token of type <b>Read</b> at"
            ' <a href="https://huggingface.co/settings/tokens" target="_blank" rel="noopener">'
            "huggingface.co/settings/tokens</a>, and paste it here once.</p>"
        )

    def _log_in(self) -> None:
        token, self.token.value = self.token.value.strip(), ""
        if token:
            threading.Thread(target=self._send, args=(token,), daemon=True).start()

    def _send(self, token: str) -> None:
        from huggingface_hub import login

        self.log_in.disabled = True
        try:
            login(token=token, add_to_git_credential=False)
            self.login_text.value = '<div class="sx-said"><b>Logged in.</b></div>'
        except Exception as error:  # of the HTTP client, which differs between versions
            problem = DataError(f"the hub did not take the token: {error}", fix="make a new one")
            self.login_text.value = shown_error(problem)
        finally:
            self.log_in.disabled = False


class DataSection:
    """Data by upload, from a file of the workspace, or from the hub, and their report.

    Args:
        chosen: Called with the source; None is the recipe's own.
        mended: Called with the settings that an error proposes, when they are wanted.
    """

    def __init__(
        self, chosen: Callable[[str | None], None], mended: Callable[[Settings], None]
    ) -> None:
        self._chosen, self._mended, self._quiet = chosen, mended, False
        self.kind = ipywidgets.ToggleButtons(options=[UPLOAD, PICK, ON_HUB])
        self.kind.add_class("sx-tabs")
        endings = ",".join([*FILE_KINDS, ".gz", ".zst"])
        self.upload = ipywidgets.FileUpload(accept=endings, description="Choose a file")
        self.files = ipywidgets.Dropdown(layout=ipywidgets.Layout(width="26rem"))
        self.again = ipywidgets.Button(icon="refresh", tooltip="Look again")
        self.hub = ipywidgets.Text(placeholder="owner/name", continuous_update=False)
        self.take = ipywidgets.Button(description="Use it")
        self.hint, self.report = ipywidgets.HTML(), ipywidgets.HTML()
        self.problem = ipywidgets.HTML()
        self.mend = ipywidgets.Button(icon="check")
        self.mend.layout.width = "auto"
        self._settings: Settings = {}
        self.show_problem(None)
        self.place = row()
        self.kind.observe(lambda _: self._show_kind(), "value")
        self.upload.observe(self._uploaded, "value")
        self.upload.observe(self._not_read, "error")
        self.files.observe(self._picked, "value")
        self.again.on_click(lambda _: self._list())
        self.take.on_click(lambda _: self._named())
        self.mend.on_click(lambda _: self._mended(self._settings))
        self._show_kind()
        self.box = section(
            heading(2, "Data", "chats as JSON lines, JSON, CSV, Parquet or text"),
            self.kind,
            self.place,
            self.hint,
            self.problem,
            self.mend,
            self.report,
        )

    def offer_own(self, is_there: bool) -> None:
        """Offer the data that the recipe names itself, or not, without choosing them."""
        before, self._quiet = self.kind.value, True
        kinds = [OWN, UPLOAD, PICK, ON_HUB] if is_there else [UPLOAD, PICK, ON_HUB]
        if list(self.kind.options) != kinds:
            self.kind.options = kinds
            self.kind.value = kinds[0] if is_there or before not in kinds else before
        self._quiet = False

    def show_problem(self, error: Exception | None) -> None:
        """Show an error of the data as a card, or none; a button sets what it proposes."""
        self.problem.value = shown_error(error) if error else ""
        self._settings = settings_in(error.fix) if isinstance(error, StrixftError) else {}
        said = ", ".join(f"{key} = {value}" for key, value in self._settings.items())
        self.mend.description = f"Set {said} and read them again"
        self.mend.layout.display = "" if said else "none"

    def working(self, text: str) -> None:
        """Show that the data are being read."""
        self.report.value = f'<p class="sx-working">{escape(text)}</p>' if text else ""

    def show_report(self, markup: str, line: str) -> None:
        """Show the report: a line, and the rest folded.

        Args:
            markup: HTML of the report.
            line: Plain text.
        """
        self.report.value = (
            f'<div class="sx-said"><b>{escape(visible(line))}</b></div>'
            '<details class="sx-fold"><summary>Counts, rows to look at, and five rows as the model'
            f' reads them</summary><div class="sx-report">{markup}</div></details>'
        )

    def _show_kind(self) -> None:
        kind, folder = self.kind.value, workspace()
        shown: dict[str, tuple[list[Any], str]] = {
            UPLOAD: (
                [self.upload],
                f"The file is copied to {folder / DATA}. A browser cannot read files of 2 GB or"
                " more (the button then does nothing): drag those into the file browser on the"
                f" left, into the folder {DATA}, and choose “{PICK}”.",
            ),
            PICK: ([self.files, self.again], f"Data files below {folder}, the newest first."),
            ON_HUB: ([self.hub, self.take], "Its split “train” is used."),
            OWN: ([], "The data that come with this recipe."),
        }
        children, text = shown[kind]
        self.place.children = children
        self.place.layout.display = "" if children else "none"
        self.hint.value = note(text)
        self.show_problem(None)
        with contextlib.suppress(OSError):  # told when something is to be written there
            (folder / DATA).mkdir(exist_ok=True)
        if kind == PICK:
            self._list()
        if kind == OWN and not self._quiet:
            self._chosen(None)

    def _list(self) -> None:
        folder = workspace()
        found = data_files(folder)
        named = [(_label(path, folder), str(path)) for path in found]
        self.files.options = [("choose …" if named else "no data files yet", ""), *named]

    def _picked(self, change: Any) -> None:
        if change["new"]:
            self._chosen(change["new"])

    def _named(self) -> None:
        name = self.hub.value.strip().removeprefix("https://huggingface.co/datasets/")
        if name:
            self._chosen(name if name.startswith(HUB) else HUB + name)

    def _not_read(self, change: Any) -> None:
        if change["new"]:
            self.show_problem(
                DataError(
                    "the browser could not read the file; one of 2 GB or more is too large for it",
                    fix=f"drag it into the file browser on the left, into the folder {DATA}, and"
                    f" choose “{PICK}”",
                )
            )

    def _uploaded(self, change: Any) -> None:
        if not change["new"]:
            return
        (file, *_) = change["new"]
        self.upload.value = ()  # its bytes are on disk from now on
        try:
            path = keep_upload(file["name"], file["content"])
        except StrixftError as error:
            self.show_problem(error)
            return
        self._chosen(str(path))


def _label(path: Path, folder: Path) -> str:
    size = path.stat().st_size
    shown = f"{size / GIB:.1f} GiB" if size > GIB else f"{max(1, size // 1024):,} KiB"
    return visible(f"{path.relative_to(folder)}   {shown}")
