import pytest

from tests.helpers.heap import quick_collections
from tests.helpers.tiny_family import make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder with the small family."""
    folder = tmp_path_factory.mktemp("lora")
    make_tiny(folder)
    with quick_collections():
        yield folder
