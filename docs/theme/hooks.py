"""MkDocs hooks: the notebook, which is kept without outputs, as a page; the repository; marks on the names in code."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

NAME = "notebooks/finetune"
_SHORT_WORD, _NAME = re.compile(r"(?<!\S)\S{2,34}(?!\S)"), r'<span class="name">\g<0></span>'


def on_config(config: Any) -> Any:
    """Link to the repository that the site is built from."""
    config.repo_url = os.environ.get("REPOSITORY_URL", config.repo_url)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add `NAME.md`, made of `NAME.ipynb`; the notebook itself stays in the site for download."""
    cells = json.loads((Path(config.docs_dir) / f"{NAME}.ipynb").read_text(encoding="utf-8"))["cells"]
    parts = [_text(cell) for cell in cells]
    parts.insert(1, f"[Download the notebook]({Path(NAME).name}.ipynb).")
    files.append(File.generated(config, f"{NAME}.md", content="\n\n".join(parts) + "\n"))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Mark the words of inline code, so that site.css can keep names and options in one piece."""
    return re.sub(r"<code>([^<\n]+)</code>", lambda code: f"<code>{_SHORT_WORD.sub(_NAME, code[1])}</code>", html)


def _text(cell: dict[str, Any]) -> str:
    text = "".join(cell["source"])
    return text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
