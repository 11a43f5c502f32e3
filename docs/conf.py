"""Sphinx's settings; `make docs` builds the pages into site/."""

from pathlib import Path
from shutil import copytree
from typing import Any

from proxytune import __version__

project = "proxytune"
author = "The proxytune authors"
copyright = author
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["notebooks"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"proxytune {version}"


def setup(app: Any) -> None:
    """Put the gallery's pages into the site as they are, in the folder where the links to them look for them."""
    app.connect(
        "build-finished",
        lambda app, error: copytree(Path(app.confdir, "gallery"), Path(app.outdir, "gallery"), dirs_exist_ok=True),
    )
