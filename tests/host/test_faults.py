"""Whatever a node raises reaches the page as one line in words, under a plain name; interrupts and full cards pass."""

import os
import traceback

import pytest
import torch

pytestmark = pytest.mark.host


@pytest.fixture
def failing(lab):
    """Runs a node of ours whose inside raises an error."""
    io = lab.pack.part("nodes.size").io

    def run(error):
        class Fails(io.ComfyNode):
            @classmethod
            def define_schema(cls):
                return io.Schema(node_id="Fails", inputs=[], outputs=[])

            @classmethod
            def execute(cls):
                raise error

        lab.pack.part("nodes.reports.faults").guarded(Fails).execute()

    return run


def test_every_node_is_guarded(lab):
    assert lab.pack.nodes
    for name, node in lab.pack.nodes.items():
        assert hasattr(node.execute.__func__, "__wrapped__") and node.__name__ == name  # by which errors call it


FAULTS = [
    KeyError("blocks.0"),
    RuntimeError("a\nb\x1b[2J" + "x" * 5000),
    IndexError(),
    OSError(28, "No space left", "x"),
]


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_a_fault_of_ours_asks_for_a_report(lab, failing, error):
    import execution

    with pytest.raises(lab.pack.errors.TurboError, match=r"^Fails: this should not have happened \(") as caught:
        failing(error)
    text = str(caught.value)
    assert type(error).__name__ in text and "report it" in text and "/issues" in text
    assert len(text) <= 400 and text.isprintable()
    assert execution.full_type_name(caught.type) == "TurboError"
    assert caught.value.__cause__ is error, "the log would not say where it was"


def test_what_a_person_can_mend_keeps_its_words_and_its_place(lab, failing):
    import execution

    with pytest.raises(lab.pack.errors.TurboError) as caught:
        failing(lab.pack.errors.TurboError("x.pth is cut short. Download it again."))
    assert str(caught.value) == "x.pth is cut short. Download it again."
    assert execution.full_type_name(caught.type) == "TurboError"
    assert "raise error" in "".join(traceback.format_tb(caught.tb)), "where it was raised first"


def test_what_the_host_acts_upon_passes(lab, failing):
    management = lab.comfy.model_management
    for error in (management.InterruptProcessingException(), torch.cuda.OutOfMemoryError("full")):
        with pytest.raises(type(error)) as caught:
            failing(error)
        assert caught.value is error


def test_files_are_called_as_the_page_lists_them(lab, failing):
    """Without the folder that they lie in, which is long and of one machine; folders that a list shows stay."""
    import folder_paths

    folder = folder_paths.get_folder_paths("diffusion_models")[0]
    for name in ("x.pth", os.path.join("wan", "x.pth")):
        with pytest.raises(lab.pack.errors.TurboError) as caught:
            failing(lab.pack.errors.TurboError(f"{os.path.join(folder, name)} is cut short. Download it again."))
        assert str(caught.value) == f"{name} is cut short. Download it again."
