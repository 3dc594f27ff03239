"""The report as a page that needs nothing else, and the run as a line in the terminal. No torch takes part."""

import os
import re
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import browser
from small_runs import train

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Reads a page as a browser does, and notes what a test can judge."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [given for _, given in self.elements if name in (given.get("class") or "").split()]

    @property
    def words(self) -> str:
        return " ".join("".join(self.texts).split())


def program(*arguments: str | Path, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "unbroken", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """Three lives of 40 steps: killed at 12 and at 27, resumed from 8 and from 24."""
    path = tmp_path / "killed"
    train(path, range(1, 13), 8)
    train(path, range(9, 28), 8)
    train(path, range(25, 41), 8)
    return path


def page_of(*runs: Path) -> tuple[Page, str]:
    file = runs[0].parent / "page.html"
    program("report", *runs, "-o", file)
    text = file.read_text()
    return Page(text), text


def test_a_page_shows_lives_kills_and_what_was_verified(killed: Path) -> None:
    page, _ = page_of(killed)
    assert "3 lives; 7 boundaries executed again, each identical" in page.words
    assert len(page.of_class("life")) == 3
    assert len(page.of_class("kill")) == 2
    assert len(page.of_class("resume")) == 2
    # 9 to 12 and 25 to 27.
    assert len(page.of_class("again")) == 2
    assert "steps 9 to 12 executed again" in page.words
    assert "steps 25 to 27 executed again" in page.words
    assert len(page.of_class("save")) == len(list((killed / "checkpoints").iterdir()))
    assert "2.15.0" in page.words


def test_a_page_tells_size_new_bytes_and_time_to_durable_of_checkpoints_that_are_gone_too(
    killed: Path,
) -> None:
    before, _ = page_of(killed)
    count = len(list((killed / "checkpoints").iterdir()))
    assert "time to durable" in before.words
    assert len(re.findall(r"\d [mu]s", before.words)) >= 2 * count
    program("prune", killed, "--last", "1")
    after, _ = page_of(killed)
    assert len(after.of_class("save")) == count
    assert len(after.of_class("gone")) == count - 1
    assert f"Checkpoints ({count})" in after.words
    # What was written for them does not change because some are gone.
    written = re.compile(r"written for them([\d.]+ \w+)")
    assert written.findall(after.words) == written.findall(before.words) != []


def test_a_page_needs_nothing_from_outside_and_knows_light_and_dark(killed: Path) -> None:
    page, text = page_of(killed)
    assert "http:" not in text and "https:" not in text and "url(" not in text
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "img", "iframe"})
    assert not any("src" in given or "href" in given for _, given in page.elements)
    assert "prefers-color-scheme:dark" in text


def test_two_runs_lie_over_each_other_with_the_first_difference_marked(killed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    train(other, range(1, 41), 8, off_at=30)
    page, _ = page_of(killed, other)
    assert len(page.of_class("curve")) == 2
    assert "they part at step 30" in page.words
    assert "The runs are not the same" in page.words
    assert f"{other} differs first at step 30, in log/loss" in page.words


def screenshot(page: Path, scheme: str, place: Path) -> set[str]:
    """Look at a page in a real browser; return the colours that it shows, as `rrggbb`."""
    place.mkdir(exist_ok=True)
    picture = place / f"{scheme}.png"
    command = [
        browser() or "chromium",
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
    ]
    command += ["--window-size=1040,900", f"--user-data-dir={place / 'profile'}", f"--screenshot={picture}"]
    command += [f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert picture.exists(), done.stderr
    return colours(picture.read_bytes())


def colours(png: bytes) -> set[str]:
    """Return the colours of a picture: PNG of 8 bits a channel, not interlaced."""
    at, compressed, width, height, channels = 8, b"", 0, 0, 0
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        body = png[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", body[:10])
            assert depth == 8
            channels = {2: 3, 6: 4}[colour]
        elif kind == b"IDAT":
            compressed += body
        at += 12 + length
    rows = zlib.decompress(compressed)
    stride = width * channels
    above, seen = bytes(stride), set[bytes]()
    for row in range(height):
        start = row * (stride + 1)
        above = unfiltered(rows[start], rows[start + 1 : start + 1 + stride], above, channels)
        seen.update(above[index : index + 3] for index in range(0, stride, channels))
    return {colour.hex() for colour in seen}


def unfiltered(kind: int, line: bytes, above: bytes, channels: int) -> bytes:
    """Undo a PNG row's filter: none, or the difference from the left, from above, their mean, or the nearest."""
    if kind == 0:
        return line
    if kind == 2:
        return bytes((value + up) & 255 for value, up in zip(line, above, strict=True))
    out = bytearray(len(line))
    for index, (value, up) in enumerate(zip(line, above, strict=True)):
        left, corner = (out[index - channels], above[index - channels]) if index >= channels else (0, 0)
        if kind == 1:
            guess = left
        elif kind == 3:
            guess = (left + up) // 2
        else:
            guess = min((left, up, corner), key=lambda other: abs(left + up - corner - other))
        out[index] = (value + guess) & 255
    return bytes(out)


@pytest.mark.browser
def test_a_browser_shows_curves_lives_and_the_parting_in_light_and_dark(killed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    train(other, range(1, 41), 8, off_at=30)
    page = tmp_path / "page.html"
    program("report", other, killed, "-o", page)
    # Paper, ink, both curves, a kill and the parting, what was executed again. The pictures are for people to judge.
    place = Path(os.environ.get("UNBROKEN_SCREENSHOTS", tmp_path / "screenshots"))
    light = {"fbfbf9", "1c2330", "2456c9", "c2410c", "c4321f", "18794e"}
    dark = {"12151c", "e6e8ee", "82a8ff", "ffa36b", "ff7a66", "4cc38a"}
    assert light - screenshot(page, "light", place) == set()
    assert dark - screenshot(page, "dark", place) == set()


def test_a_run_that_did_not_repeat_itself_says_so_on_top(tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(path, range(1, 13), 8)
    train(path, range(9, 21), 8, off_at=10)
    page, _ = page_of(path)
    assert "step 10 came out differently when life 2 executed it again" in page.words
    assert "did not repeat itself" in page.words


def test_names_cannot_smuggle_markup_into_the_page(killed: Path, tmp_path: Path) -> None:
    evil = tmp_path / "<b onload=x>&run"
    killed.rename(evil)
    page, text = page_of(evil)
    assert "<b onload" not in text
    assert "<b onload=x>&run" in page.words


def test_watch_says_where_the_run_is(killed: Path, tmp_path: Path) -> None:
    line = program("watch", "--once", killed)
    assert line.startswith("step 40 epoch 0 life 3 loss 0.02500 █")
    assert "7 executed again: identical" in line
    assert "cannot open directory" in program("watch", "--once", tmp_path / "nothing", code=2)
