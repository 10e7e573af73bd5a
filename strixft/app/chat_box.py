"""A conversation in a notebook: base and tuned beside each other, written as the answers come."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from strixft.app.cards import shown_error
from strixft.app.chat import LONGEST_ANSWER, Chat, Turn, own_temperature
from strixft.evaluate.variants import VARIANTS
from strixft.run.folder import Run
from strixft.run.open import find_run
from strixft.support.text import visible

SHOWN_EVERY_S = 0.15
"""Seconds between two changes of the page while an answer comes."""

STYLE = """
.sx-chat { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem }
.sx-chat .sx-turns { max-height: 32rem; overflow-y: auto; display: flex;
  flex-direction: column-reverse }  /* which stays at its end */
.sx-chat .sx-asked { margin: 1rem 0 .5rem auto; max-width: 80%; width: fit-content;
  padding: .4rem .8rem; border-radius: .8rem; background: rgba(120, 130, 150, .2) }
.sx-chat .sx-answers { display: grid; gap: .6rem;
  grid-template-columns: repeat(auto-fit, minmax(min(16rem, 100%), 1fr)) }
.sx-chat .sx-answer { border: 1px solid rgba(120, 130, 150, .35); border-radius: .5rem;
  padding: .4rem .8rem; min-width: 0 }
.sx-chat .sx-tuned { border-color: #c2410c }
.sx-chat .sx-who { font-size: .8rem; opacity: .75 }
.sx-chat .sx-text { white-space: pre-wrap; overflow-wrap: anywhere }
.sx-chat .sx-hint { opacity: .85 }
"""

WAITING = "…"


def _shown(text: str) -> str:
    return escape(visible(text))


def transcript(turns: Sequence[Turn]) -> str:
    """Format a conversation as HTML; all text is escaped.

    >>> "&lt;b&gt;" in transcript([Turn("<b>", {"base": "Yes."})])
    True
    """
    return "".join(_turn(turn) for turn in turns)


def _turn(turn: Turn) -> str:
    answers = "".join(
        f'<div class="sx-answer sx-{variant}"><div class="sx-who">{variant}</div>'
        f'<div class="sx-text">{_shown(turn.answers[variant].strip()) or WAITING}</div></div>'
        for variant in VARIANTS
        if variant in turn.answers
    )
    asked = f'<div class="sx-asked sx-text">{_shown(turn.text)}</div>'
    return f'{asked}<div class="sx-answers">{answers}</div>'


class ChatBox:
    """The widgets of a conversation.

    Args:
        run: A trained run.
    """

    def __init__(self, run: Run) -> None:
        import ipywidgets as widgets

        self._run = run
        self._talk: Chat | None = None
        self._thread: threading.Thread | None = None
        choices = [("base | tuned", VARIANTS), ("tuned", ("tuned",)), ("base", ("base",))]
        self.variants = widgets.ToggleButtons(options=choices)
        self.variants.style.button_width = "7rem"
        self.said = widgets.HTML()
        self.text = widgets.Text(placeholder="Your message, then Enter")
        self.text.layout.flex = "1 1 12rem"
        self.send = widgets.Button(description="Send", button_style="primary")
        self.stop = widgets.Button(description="Stop", icon="stop", disabled=True)
        self.clear = widgets.Button(description="Clear", tooltip="Forgets the conversation")
        for button in (self.send, self.stop, self.clear):
            button.layout.width = "5.5rem"
        wide = {"style": {"description_width": "7rem"}}
        self.temperature = widgets.FloatSlider(
            own_temperature(run.recipe), min=0, max=2, step=0.05, description="temperature", **wide
        )
        self.temperature.tooltip = "0 takes the most likely token; at first the model's own"
        self.max_tokens = widgets.BoundedIntText(
            LONGEST_ANSWER, min=1, max=32_768, description="most tokens", **wide
        )
        self.system = widgets.Textarea(
            placeholder="empty: none", description="system text", rows=2, **wide
        )
        self.system.layout.width = "min(calc(100% - 1rem), 40rem)"
        settings = widgets.VBox([self.temperature, self.max_tokens, self.system])
        folded = widgets.Accordion([settings], titles=("Settings",), selected_index=None)
        self.send.on_click(lambda _: self._begin())
        self.text.on_msg(self._entered)
        self.stop.on_click(lambda _: self._end())
        self.clear.on_click(lambda _: self._forget())
        line = widgets.HBox([self.text, self.send, self.stop, self.clear])
        line.layout.flex_flow = "row wrap"
        self.box = widgets.VBox([self.variants, self.said, line, folded])
        self.box.layout.max_width = "62rem"
        self.box.add_class("sx-chat-box")
        self._show([])

    def _entered(self, _: Any, content: dict[str, Any], buffers: Any) -> None:
        if content.get("event") == "submit":
            self._begin()

    def _begin(self) -> None:
        """Show the message at once and answer in a thread, so that the stop button is heard."""
        text = self.text.value.strip()
        if not text or self.send.disabled:
            return
        self.text.value = ""
        self._busy(True)
        asked = self.variants.value
        loading = "" if self._talk else "Loading the model …"
        self._show([*self._turns(), Turn(text, dict.fromkeys(asked, ""))], loading)
        self._thread = threading.Thread(target=self._answer, args=(text, asked), daemon=True)
        self._thread.start()

    def _end(self) -> None:
        if self._talk is not None:
            self._talk.stop()

    def wait(self) -> None:
        """Wait until the last message is answered."""
        if self._thread is not None:
            self._thread.join()

    def _busy(self, is_busy: bool) -> None:
        self.send.disabled = self.clear.disabled = is_busy
        self.stop.disabled = not is_busy

    def _turns(self) -> list[Turn]:
        return self._talk.turns if self._talk else []

    def _answer(self, text: str, asked: Sequence[str]) -> None:
        try:
            self._talk = talk = self._talk or Chat(self._run)
            talk.temperature, talk.max_tokens = self.temperature.value, self.max_tokens.value
            talk.system = self.system.value.strip()
            turn, told = Turn(text, dict.fromkeys(asked, "")), 0.0
            for variant, piece in talk.ask(text, asked):
                turn.answers[variant] += piece
                if time.monotonic() - told > SHOWN_EVERY_S:
                    self._show([*talk.turns, turn])
                    told = time.monotonic()
            self._show(talk.turns)
        except Exception as error:  # else the page would wait for ever
            self.text.value = text
            self._show(self._turns(), shown_error(error))
        finally:
            self._busy(False)

    def _forget(self) -> None:
        if self._talk is not None:
            self._talk.reset()
        self._show([])

    def _show(self, turns: Sequence[Turn], more: str = "") -> None:
        hint = "Base and tuned answer the same message; the model is loaded with the first one."
        empty = "" if turns or more else hint
        self.said.value = (
            f'<div class="sx-chat"><style>{STYLE}</style><div class="sx-turns"><div>'
            f"{transcript(turns)}</div></div>"
            f'<div class="sx-hint">{more or empty}</div></div>'
        )


def chat(run: Run | str | Path) -> Any:
    """Return a conversation with a trained run and its base as widgets for a notebook.

    Args:
        run: A run, its name under `runs/`, or its folder.

    Raises:
        StageError: There is no such run.
    """
    return ChatBox(find_run(run)).box
