"""The recorded English of every node is that of the schemas in the real ComfyUI, which also serves the translations."""

import shutil

import pytest

from tests.tools.record_schemas import LOCALES, node_defs, read

pytestmark = pytest.mark.host


def test_recording_is_that_of_the_schemas(pack):
    object_info = {name: node.GET_NODE_INFO_V1() for name, node in pack.nodes.items()}
    assert node_defs(object_info) == read("en"), "record again: see tests/tools/record_schemas.py"


def test_host_reads_the_translations(comfy, monkeypatch, tmp_path):
    import folder_paths
    from app.custom_node_manager import CustomNodeManager

    shutil.copytree(LOCALES, tmp_path / "TurboWan" / "locales")  # alone: the host merges those of all packs in a folder
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda _: [str(tmp_path)])
    translations = CustomNodeManager().build_translations()
    for language in ("en", "ko", "zh", "ja"):
        assert translations[language]["nodeDefs"].items() >= read(language).items()
