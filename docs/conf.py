"""How Sphinx makes the site out of the folder that `build.py` puts together: `make book`."""

import sys
from importlib.resources import files
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # prose.py

import coneslab  # noqa: E402

project = "coneslab"
copyright = "the coneslab authors"
version = release = coneslab.__version__
language = "en"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "prose"]
exclude_patterns = ["README.md", "parts"]  # included by other pages

# The notebooks are shown as they were saved.
nb_execution_mode = "off"
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# The reference: plain signatures, one argument a line where they are long, members in the order of the file.
autodoc_default_options = {"members": True, "member-order": "bysource", "special-members": "__call__"}
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
modindex_common_prefix = ["coneslab."]
toc_object_entries_show_parents = "hide"

html_theme = "pydata_sphinx_theme"
html_title = "coneslab"
# MathJax from a package, as one file that fetches nothing: the site is read without a network.
html_static_path = ["_static", str(files("sphinx-mathjax-offline") / "static" / "mathjax" / "tex-svg-full.js")]
mathjax_path = "tex-svg-full.js"
html_css_files = ["book.css"]
html_copy_source = html_show_sourcelink = False
pages = (
    "index",
    "notebooks",
    "results",
    "instructors",
    "syllabus",
    "glossary",
    "how_it_hangs_together",
    "CONTRIBUTING",
)
html_sidebars = {page: [] for page in pages}
html_theme_options = {
    "show_prev_next": True,
    "navigation_with_keys": False,
    "header_links_before_dropdown": 6,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
