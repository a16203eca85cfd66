# SPDX-License-Identifier: Apache-2.0
"""mkdocs hooks: render the manual pages as HTML, and rewrite links that lead out of docs/. See mkdocs.yml."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from docutils.core import publish_parts
from mkdocs.structure.files import File

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

# Parts of the navigation, and the folder whose pages each has.
FOLDERS = {"How to": "howto", "Reference": "reference"}
LINK = re.compile(r"\[([^\]]*)\]\(([^)#:]+)(#[^)]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List each page of FOLDERS that mkdocs.yml leaves out, by its own heading."""
    parts = {title: pages for part in config.nav or [] for title, pages in part.items()}
    for title, folder in FOLDERS.items():
        listed = {path for page in parts[title] for path in page.values()}
        found = sorted(f"{folder}/{path.name}" for path in Path(config.docs_dir, folder).glob("*.md"))
        parts[title] += [path for path in found if path not in listed]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each manual page."""
    for path in sorted(Path(config.docs_dir, "man").glob("*.rst")):
        settings = {"report_level": 2, "halt_level": 2, "initial_header_level": 2}
        body = publish_parts(path.read_text(), writer_name="html5", settings_overrides=settings)["html_body"]
        files.append(File.generated(config, f"man/{path.stem}.md", content=f"# {path.stem}\n\n<div>{body}</div>\n"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page whose links lead somewhere: to a manual page's HTML; out of docs/ there is only the file's name."""
    top = Path(config.docs_dir).parent

    def resolve(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), target))
        if path.startswith("docs/man/") and path.endswith(".rst"):
            return f"[{text}]({target[: -len('.rst')]}.md)"
        if path.startswith("docs/") or not (top / path).exists():
            # mkdocs itself follows these, and warns.
            return match[0]
        return f"{text} (`{path}` in the repository)" if text != path else f"`{path}`"

    return LINK.sub(resolve, markdown)
