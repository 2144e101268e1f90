"""Sphinx's settings for the site. `./lab site` copies the folder, adds lessons and generated pages, and builds.

Formulas become MathML while the site is built, so that a page needs neither a script nor a network to show them.
"""

import functools
from typing import Any

from docutils import nodes
from sphinx.search import en, languages

from course.formulas import mathml

project = "Inference optimisation, measured"
copyright = "the authors, Apache licence 2.0"
language = "en_GB"
extensions = ["myst_nb"]

nb_execution_mode = "off"  # what is shown was recorded by `labkit run --record`
nb_merge_streams = True
nb_ipywidgets_js = {}
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

html_theme = "sphinx_book_theme"
html_title = project
html_favicon = "favicon.svg"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
html_context = {"default_mode": "auto"}  # without it the theme complains on the first visit
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,  # ./lab start makes a copy without the answers
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the search button stands in the sidebar
    "home_page_in_toc": False,
    "footer_content_items": "copyright.html",
}


def setup(app: Any) -> None:
    """Register the renderer of formulas. Sphinx calls the function with its application object."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    languages["en"] = _English


class _English(en.SearchEnglish):
    """English for the search. Sphinx asks for a word's stem on each page, which takes a sixth of the build."""

    def __init__(self, options: dict[str, str]) -> None:
        super().__init__(options)
        self.stem = functools.cache(self.stem)


def _inline(self: Any, node: nodes.math) -> None:
    self.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def _block(self: Any, node: nodes.math_block) -> None:
    self.body.append(f'<div class="formula">{mathml(node.astext(), display="block")}</div>')
    raise nodes.SkipNode
