import pytest

from tests.helpers.tiny_dits import make_tiny_dits


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder with the diffusion models of the small family."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_dits(folder)
    return folder
