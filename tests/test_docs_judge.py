"""The page on judges names every setting and task, and claims no test that was not made."""

import re

from conftest import REPOSITORY

from strixft.prepare.augment import TASKS
from strixft.recipe.servers import Augment, Judge
from strixft.servers.client import BUSY, FOLDER, TRIES

PAGE = (REPOSITORY / "docs" / "judge.md").read_text(encoding="utf-8")


def test_every_setting_and_task_is_explained() -> None:
    settings = Judge.model_fields.keys() | Augment.model_fields.keys()
    assert len(settings) > 8
    for name in settings | TASKS.keys():
        assert re.search(rf"\b{name}\b", PAGE), name


def test_what_is_tried_again_is_what_the_page_says() -> None:
    assert ", ".join(map(str, BUSY)) in PAGE
    assert f"tried {TRIES} times, after 2 and 4 seconds" in PAGE
    assert f"strixft/{FOLDER}`" in PAGE
    for settings in (Judge, Augment):
        fields = settings.model_fields
        assert f"`timeout_s` ({fields['timeout_s'].default} s)" in PAGE
        assert f"`max_tokens` ({fields['max_tokens'].default})" in PAGE


def test_the_page_claims_no_test_on_the_machine() -> None:
    assert "None of these was run on a Strix Halo by this project" in PAGE
