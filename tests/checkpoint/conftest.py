import pytest
import torch

from tests.helpers.tiny_dits import RAGGED, make_tiny_dits, tiny_state_dict


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder with the diffusion models of the small family."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_dits(folder)
    return folder


@pytest.fixture(scope="session")
def published():
    return tiny_state_dict(0)


@pytest.fixture
def state(published):
    """A model as published, unquantized."""
    return dict(published)  # tests replace tensors, they do not write into them


@pytest.fixture
def ragged(tmp_path):
    """A file whose matrices fill no whole number of int8 blocks."""
    path = tmp_path / "ragged.pth"
    torch.save(tiny_state_dict(3, RAGGED), path)
    return path
