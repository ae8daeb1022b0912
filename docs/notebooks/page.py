"""MkDocs hook: shows the notebook of this folder as a page, from its Markdown and code cells.

The notebook is kept without outputs, so there is nothing else to show.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

NAME = "notebooks/finetune"


def on_files(files: Files, config: Any) -> Files:
    """Add `NAME.md`, made of `NAME.ipynb`; the notebook itself stays in the site for download."""
    cells = json.loads((Path(config.docs_dir) / f"{NAME}.ipynb").read_text(encoding="utf-8"))["cells"]
    parts = [_text(cell) for cell in cells]
    parts.insert(1, f"[Download the notebook]({Path(NAME).name}.ipynb).")
    files.append(File.generated(config, f"{NAME}.md", content="\n\n".join(parts) + "\n"))
    return files


def _text(cell: dict[str, Any]) -> str:
    text = "".join(cell["source"])
    return text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
