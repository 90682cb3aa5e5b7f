"""Pages as tests read them, and as Chromium shows them."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

from tests.helpers import PATIENCE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--hide-scrollbars"
)


class Page(HTMLParser):
    """A page's tags, attributes and text. A tag that is not closed fails the test."""

    VOID = ("meta", "link", "br", "hr", "img", "input")

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.feed(file.read_text())
        assert self.stack == [], f"not closed: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.append((name, value or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if "svg" in self.stack:
            self.words += data
        elif "style" not in self.stack:
            self.words += " ".join(data.split()) + " "


def titles(file: Path) -> list[str]:
    """The titles of the figures."""
    return re.findall(r"<h3>(.*?)</h3>", file.read_text())


def browse(profile: Path, *arguments: str) -> str:
    """The output of Chromium, with a profile of its own."""
    command = [str(CHROMIUM), *QUIET.split(), f"--user-data-dir={profile}", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    return done.stdout
