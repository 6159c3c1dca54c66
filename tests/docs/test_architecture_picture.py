"""The picture of the architecture is that of the imports as they are."""

from xml.etree import ElementTree

from tests.scripts import load
from tests.test_architecture import LAYERS

architecture = load("docs/architecture.py")


def test_the_picture_is_drawn_anew():
    """If not, ``python docs/architecture.py`` draws it."""
    assert architecture.PICTURE.read_text(encoding="utf-8") == architecture.picture()


def test_every_room_is_in_the_picture():
    root = ElementTree.fromstring(architecture.picture())
    names = [
        t.text for t in root.iter("{http://www.w3.org/2000/svg}text") if t.get("class") == "name"
    ]
    assert set(names) == set().union(*LAYERS) - {"__init__"}


def test_arrows_are_imports_that_no_chain_implies():
    arrows = architecture.arrows()
    assert ("estimator", "training") in arrows and ("training", "model") in arrows
    assert ("estimator", "model") not in arrows  # it imports from there, by training too
    assert "model" in architecture.imports()["estimator"]


def test_arrows_point_down():
    places = architecture.boxes()
    assert all(places[a].y < places[b].y for a, b in architecture.arrows())
