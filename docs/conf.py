"""Sphinx's settings; `make docs` builds the pages into site/."""

from pathlib import Path
from shutil import copytree
from typing import Any

from proxytune import __version__

project = "proxytune"
author = "The proxytune authors"
copyright = author
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebook is shown with the outputs in its file, which a test compares with a fresh run
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"proxytune {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True  # in a console block, what follows `$ `; other blocks are copied whole
copybutton_line_continuation_character = "\\"

# Some servers refuse programs. `make linkcheck` says what else is out of reach.
linkcheck_ignore = [r"http://localhost.*", r"http://127\.0\.0\.1.*"]
linkcheck_anchors = False


def setup(app: Any) -> None:
    """Put the gallery's pages into the site as they are, in the folder where the links to them look for them."""
    app.connect(
        "build-finished",
        lambda app, error: copytree(Path(app.confdir, "gallery"), Path(app.outdir, "gallery"), dirs_exist_ok=True),
    )
