"""Sphinx, as the scverse template sets it up; docs/build.py makes the folder that it reads."""

import re
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from docutils.nodes import Element
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

HERE = Path(__file__).parent
REPR = re.compile(r"<(?:function|class) '?([\w.]+)'?(?: at 0x\w+)?>")

project = "pyro_scanvi"
author = copyright = "The pyro_scanvi developers"
release = version = version_of("pyro-scanvi")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",  # MathJax comes with the site, so that it works without a network
]
exclude_patterns = ["jupyter_execute"]
nitpicky = True
# No link to other packages, whose inventories would be downloaded, nor to what is private.
OTHERS = (
    "torch|pyro|numpy|np|pandas|pd|anndata|ad|lightning|scipy|sklearn|scanpy|matplotlib|xarray|zuko|h5py|zarr"
    "|collections|contextlib|typing|pathlib|os|abc|csr_matrix"
)
nitpick_ignore_regex = [
    (r"py:.*", rf"({OTHERS})(\..*)?"),
    (r"py:.*", r"(.*\.)?_\w+"),
    (r"py:.*", r".*\.(PiecewiseInterface|RevisedELBO|Trained)"),
    (r"py:data", r"(.*\.)?[A-Z_]+"),
    (r"py:class", r"Axes|Dtype|dict\[str"),
    (r"py:attr", r"label"),
]

# ---- pages ---------------------------------------------------------------------------------------

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # notebooks/execute.py has run them
nb_merge_streams = True
nb_ipywidgets_js: dict[str, dict] = {}
suppress_warnings = ["mystnb.unknown_mime_type"]
mathjax3_config = {"chtml": {"scale": 0.95}}

# ---- docstrings ----------------------------------------------------------------------------------

default_role = "code"  # `name` is an argument
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
python_maximum_signature_line_length = 90
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]

# ---- look ----------------------------------------------------------------------------------------

html_theme = "sphinx_book_theme"
html_title = "pyro_scanvi"
html_static_path = [str(HERE / "_static")]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = True  # notebooks are downloaded from there
html_theme_options = {
    "show_navbar_depth": 1,
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
}
html_context = {"default_mode": "auto"}
pygments_style = "tango"


def by_its_last_name(app: Sphinx, env: Any, node: Element, content: Element) -> Element | None:
    """A link to what is called by its short or public name, if one thing alone has it."""
    if node.get("refdomain") != "py":
        return None
    python, name = env.get_domain("py"), node["reftarget"].lstrip(".~")
    ends = f".{name.removeprefix('pyro_scanvi.')}"
    found = [f for f, o in python.objects.items() if f.endswith(ends) and not o.aliased]
    if len(found) != 1:
        return None
    place, to = node["refdoc"], python.objects[found[0]]
    return make_refnode(app.builder, place, to.docname, to.node_id, content, found[0])


def named_defaults(
    app: Sphinx, kind: str, name: str, it: Any, options: Any, signature: str | None, returned: Any
) -> tuple[str | None, Any]:
    """Functions and classes that are defaults of a dataclass by their name, which can be read."""
    return signature and REPR.sub(r"\1", signature), returned


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("autodoc-process-signature", named_defaults)
    app.connect("missing-reference", by_its_last_name)
