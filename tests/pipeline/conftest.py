import pytest
from PIL import Image

from tests.helpers.heap import quick_collections
from tests.helpers.tiny_family import make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder with the small family and an image twice as wide as it is high."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder)
    Image.new("RGB", (48, 24), (200, 40, 90)).save(folder / "image.png")
    with quick_collections():
        yield folder
