# SPDX-License-Identifier: GPL-2.0-or-later
"""Hooks of MkDocs: the documents outside of docs/ become pages, and links between all of them lead somewhere.

- A man page becomes ``man/NAME.SECTION.md``, from the source that scdoc reads.
- NEWS.md and the other documents at the top of the tree become pages beside those of docs/.
- A document may link to any other file of the tree. The site gets a copy of that file, as text.
- ``cprctl(1)``, and in man pages the name of a document, become links.

A reference to a page or a file that does not exist ends the build, as MkDocs itself does with ``--strict``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).parent.parent.parent
MAN = ROOT / "packaging/man"
AT_THE_TOP = ("CONTRIBUTING.md", "NEWS.md", "SECURITY.md")
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")
CODE = r"^```.*?^```|^ {4}.*?$|`[^`]*`"
OURS = r"(?:cpr|org\.cpr)[\w.-]*"
REFERENCE = re.compile(rf"({CODE})|\b({OURS})\((\d)\)", re.MULTILINE | re.DOTALL)


class BrokenReference(Exception):
    """Page, and the reference that leads nowhere."""


# MkDocs calls these by their names.


def on_files(files: Any, *, config: Any) -> Any:
    from mkdocs.structure.files import File

    for name, source in man_sources():
        files.append(File.generated(config, f"man/{name}.md", content=man_page(source)))
    for name in AT_THE_TOP:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    files.append(File.generated(config, "site.css", abs_src_path=str(Path(__file__).parent / "site.css")))
    for page in list(files.documentation_pages()):
        for path in other_files(page.src_uri, page.content_string):
            if files.get_file_from_path(copy_of(path)) is None:
                files.append(File.generated(config, copy_of(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    here = page.file.src_uri
    if here.startswith("man/"):
        return markdown
    markdown = re.sub(r"^```(\w+) .*$", r"```\1", markdown, flags=re.MULTILINE)  # the other words are for our tests
    return with_references(here, LINK.sub(lambda link: f"]({target(here, link[1])}{link[2] or ''})", markdown))


def on_post_build(*, config: Any) -> None:
    """No page of the site loads anything from elsewhere."""
    for path in Path(config.site_dir).rglob("*.html"):
        found = re.search(r"<(?:link|script|img)\b[^>]*(?:href|src)=\"(?:https?:)?//[^>]*>", path.read_text())
        if found:
            raise BrokenReference(f"{path}: {found[0]}")


# Links between documents


def origin(page: str) -> PurePosixPath:
    """The file of the tree that a page is made from."""
    return PurePosixPath(page if page in AT_THE_TOP else f"docs/{page}")


def other_files(page: str, markdown: str) -> Iterator[str]:
    """Files of the tree that a document links to, and that are no pages."""
    if not page.startswith("man/"):
        for link in LINK.finditer(markdown):
            path = resolved(page, link[1])
            if not path.startswith("docs/") and path not in AT_THE_TOP:
                yield path


def resolved(page: str, link: str) -> str:
    """The file of the tree that a link leads to."""
    path = os.path.normpath(origin(page).parent / link)
    if not (ROOT / path).is_file():
        raise BrokenReference(f"{origin(page)}: {link}")
    return path


def target(page: str, link: str) -> str:
    """The same link from page to page."""
    path = resolved(page, link)
    there = path.removeprefix("docs/") if path.startswith("docs/") or path in AT_THE_TOP else copy_of(path)
    return os.path.relpath(there, PurePosixPath(page).parent)


def copy_of(path: str) -> str:
    """Where the site has a file of the tree. With .txt, so that a browser shows it."""
    return f"source/{path}.txt"


def with_references(page: str, markdown: str) -> str:
    """``cprctl(1)`` outside of code leads to the man page."""

    def link(found: re.Match[str]) -> str:
        code, name, section = found.groups()
        if code is not None:
            return code
        up = "../" * (len(PurePosixPath(page).parts) - 1)
        return f"[{name}({section})]({up}man/{known_man_page(page, name, section)}.md)"

    return REFERENCE.sub(link, markdown)


def known_man_page(page: str, name: str, section: str) -> str:
    if f"{name}.{section}" not in man_names():
        raise BrokenReference(f"{page}: {name}({section})")
    return f"{name}.{section}"


# Man pages


def man_names() -> list[str]:
    return [path.stem for path in sorted(MAN.glob("*.scd"))] + ["org.cpragent1.5"]


def man_sources() -> Iterator[tuple[str, str]]:
    for name in man_names():
        path = MAN / f"{name}.scd"
        if path.exists():
            yield name, path.read_text()
        else:
            contract = ROOT / "agent/cpr_agent/bus/org.cpragent1.xml"
            command = [sys.executable, *map(str, (MAN / "interface", contract, ROOT / "docs/operations.md"))]
            yield name, subprocess.run(command, check=True, capture_output=True, text=True).stdout


def man_page(source: str) -> str:
    """Markdown of a page that scdoc reads: of the part of scdoc(5) that our pages use."""
    title, _, body = source.partition("\n")
    return f"# {title}\n\n" + "\n".join(block(body.splitlines(), lambda line: man_line(title, line))) + "\n"


def block(lines: list[str], line_of: Callable[[str], str]) -> Iterator[str]:
    """The lines of one level: paragraphs, headings, lists, code, and entries with indented descriptions; no comments."""
    in_code = False
    for number, line in enumerate(lines):
        if line == "```":
            in_code = not in_code
            yield ""
        elif in_code:
            yield f"    {line}"
        elif line.startswith("#"):
            yield f"#{line.replace('[', chr(92) + '[')}"
        elif line.startswith("- "):
            yield f"- {line_of(line[2:])}"
        elif not line.startswith(("\t", "; ")):
            yield line_of(line)
            described = indented(lines[number + 1 :]) if line else []
            if described:
                first, *rest = block(described, line_of)
                yield f":   {first}"
                yield from (f"    {one}" if one else "" for one in rest)
                yield ""


def indented(lines: list[str]) -> list[str]:
    """The description at the head of these lines, one level of indentation less; none if they do not begin with one."""
    if not (lines and lines[0].startswith("\t")):
        return []
    return [line[1:] for line in takewhile(lambda line: not line or line.startswith("\t"), lines)]


def man_line(page: str, line: str) -> str:
    """Markdown of one line of scdoc's text: bold, underlined, and references."""
    out = "".join(_INLINE[kind](text) for kind, text in inline(line))
    out = re.sub(rf"<b>({OURS})</b>\((\d)\)", lambda m: f"[{m[1]}({m[2]})]({known_man_page(page, m[1], m[2])}.md)", out)
    return re.sub(
        r"(?:/usr/share/doc/cpr-agent/)?\b([\w-]+\.md)\b(?!\))", lambda m: f"[{m[0]}]({document(page, m[1])})", out
    )


def document(page: str, name: str) -> str:
    if not (ROOT / "docs" / name).is_file():
        raise BrokenReference(f"{page}: {name}")
    return f"../{name}"


def inline(line: str) -> Iterator[tuple[str, str]]:
    """Pieces of a line, each with its kind: "plain", "bold", or "underlined"."""
    marks = (
        r"\*(?P<bold>(?:\\.|[^*\\])+)\*|(?<![\w/])_(?P<underlined>(?:\\.|[^\\])+?)_(?!\w)|(?P<plain>(?:\\.|[^*_\\])+|[*_])"
    )
    for found in re.finditer(marks, line):
        assert found.lastgroup is not None
        yield found.lastgroup, re.sub(r"\\(.)", r"\1", found[0] if found.lastgroup == "plain" else found[found.lastgroup])


def plain(text: str) -> str:
    """What Markdown would take for a mark or a tag, as text."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]])", r"\\\1", text)


_INLINE: dict[str, Callable[[str], str]] = {
    "plain": plain,
    "bold": lambda text: f"<b>{plain(text)}</b>",
    "underlined": lambda text: f"<i>{plain(text)}</i>",
}
