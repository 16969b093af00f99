"""Files in every spelling and number format, as TurboLoader and TurboSave take them."""

import pytest
import torch

from tests.helpers.states import saved
from tests.helpers.tiny_dits import tiny_state_dict, unquantized

pytestmark = pytest.mark.host


@pytest.fixture
def state():
    return tiny_state_dict(0)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_dtypes_of_the_published_file_change_nothing(lab, state, tmp_path, dtype):
    """proj_l, modulation and embeddings in bf16, and the same values in float32."""
    paths = [saved(unquantized(state, rest), tmp_path / f"{rest}.pth") for rest in (torch.bfloat16, torch.float32)]
    ours, theirs = (lab.denoise(lab.load(path, dtype)) for path in paths)
    assert torch.equal(ours, theirs)
