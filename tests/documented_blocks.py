"""The fenced blocks of README.md, CONTRIBUTING.md and docs/, as a Markdown parser sees them, and the commands in them.

The convention: ``bash`` for commands, ``python`` for Python, ``yaml``, ``json`` and ``toml`` for files, ``text`` for
output, formulas and trees of files. A comment before a block says where it is not run by the default suite:

    <!-- not run: REASON -->    never; its commands' words are checked all the same
    <!-- long: REASON -->       run by `make test-long`

A block whose paragraph ends in "`NAME`:" is the content of the file NAME.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conftest import PROJECT
from markdown_it import MarkdownIt

LANGUAGES = ("bash", "python", "yaml", "json", "toml", "text")
INDENTED = "indented"  # no fence, so no language

_MARK = re.compile(r"<!--\s*(not run|long):\s*(.*?)\s*-->", re.DOTALL)
_FILE = re.compile(r"`([\w.\-]+\.(?:py|yaml|jsonl?|toml|sh|sbatch))`[^`]*:$")
_OPERATORS = frozenset({"&&", "||", ";", "|", "&"})
_KEYWORDS = frozenset({"for", "do", "done", "if", "then", "fi"})


@dataclass(frozen=True)
class Block:
    """One block of code.

    Attributes:
        page: its path below the project.
        line: of its first line, from 1.
        language: what the fence says, an empty text if nothing, or ``INDENTED``.
        text: its content.
        mark: ``not run``, ``long`` or an empty text.
        reason: what the mark says.
        file: the name of the file that it is, or an empty text.
    """

    page: str
    line: int
    language: str
    text: str
    mark: str = ""
    reason: str = ""
    file: str = ""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """Every page whose blocks are held to the convention."""
    below = sorted((PROJECT / "docs").rglob("*.md"))
    return ["README.md", "CONTRIBUTING.md", *(path.relative_to(PROJECT).as_posix() for path in below)]


def blocks(page: str, root: Path = PROJECT) -> list[Block]:
    """Return a page's blocks, in order."""
    return list(_blocks(page, (root / page).read_text(encoding="utf-8")))


def _blocks(page: str, text: str) -> Iterator[Block]:
    mark, reason, file = "", "", ""
    for token in MarkdownIt("commonmark").parse(text):
        if token.type in ("fence", "code_block"):
            language = token.info.strip() if token.type == "fence" else INDENTED
            line = (token.map or [0])[0] + (2 if token.type == "fence" else 1)
            yield Block(page, line, language, token.content, mark, reason, file)
        if token.type == "html_block":
            found = _MARK.fullmatch(token.content.strip())
            mark, reason = (found[1], " ".join(found[2].split())) if found else ("", "")
            continue
        mark, reason = "", ""
        if token.type == "inline":
            named = _FILE.search(token.content)
            file = named[1] if named else ""
        elif token.type != "paragraph_close":
            file = ""


def commands(script: str) -> list[list[str]]:
    """Return the simple commands of a shell script as words, without comments, variables' settings and redirections.

    Example: ``A=1 lm_eval run > out && cd x`` is ``[["lm_eval", "run"], ["cd", "x"]]``.
    """
    found: list[list[str]] = [[]]
    script = re.sub(r"\w+=\([^)]*\)", "", script.replace("\\\n", " "))  # arrays
    for line in script.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&<>")
        lexer.whitespace_split = True
        skip = False
        for word in lexer:
            ends = word.endswith(";") and word != ";"
            if skip:
                skip = False
            elif word in _OPERATORS:
                found.append([])
            elif word in (">", ">>", "<", "2>"):
                skip = True
            else:
                found[-1].append(word.removesuffix(";"))
            if ends:
                found.append([])
        found.append([])
    return [words for one in found if (words := _plain(one))]


def _plain(words: list[str]) -> list[str]:
    """Drop what stands before a command: ``do``, and variables that are set for it. A loop's head is no command."""
    while words and (words[0] in _KEYWORDS - {"for"} or re.match(r"\w+=", words[0])):
        words = words[1:]
    return [] if words[:1] == ["for"] else words
