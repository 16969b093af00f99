"""Models in Diffusers' layout: one file, a folder, the index of its shards; and all ways in which shards do not fit."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.diffusers_files import INDEX, renamed, repacked, sharded
from tests.helpers.states import official, plain, same, saved
from tests.helpers.tiny_dits import TINY, tiny_state_dict, unquantized
from turbo_core import checkpoint
from turbo_core.checkpoint.formats import FORMATS
from turbo_core.checkpoint.names import DIFFUSERS, PROJ_L, is_quantizable
from turbo_core.checkpoint.others.diffusers import layer_name, official_name
from turbo_core.checkpoint.shapes import expected_shapes
from turbo_core.errors import TurboError

SHARD = "diffusion_pytorch_model-0000{}-of-00003.safetensors"


@pytest.fixture
def index(state, tmp_path):
    return sharded(renamed(state), tmp_path / "model")


def image_branch(state):
    """The tensors of Wan 2.1's image branch beside those of a state."""
    branch = {f"img_emb.proj.{i}.{part}": torch.ones(8) * i for i in (0, 1, 3, 4) for part in ("weight", "bias")}
    branch["img_emb.emb_pos"] = torch.ones(1, 514, 8)
    for n in (0, 1):
        for name in ("k_img.weight", "k_img.bias", "v_img.weight", "v_img.bias", "norm_k_img.weight"):
            branch[f"blocks.{n}.cross_attn.{name}"] = torch.ones(256) * n
    return state | branch


def test_every_name_is_known_both_ways(state):
    names = image_branch(state) | {"blocks.1.self_attn.comfy_attention.config": torch.zeros(1)}
    for name, theirs in zip(official(names), renamed(official(names))):
        assert official_name(theirs) == name
    layers = {name.rpartition(".")[0] for name in expected_shapes(2, has_sla=True) if "modulation" not in name}
    for layer in layers - {"patch_embedding"}:
        assert official_name(f"{layer_name(layer)}.weight") == f"{layer}.weight"
    assert official_name("scale_shift_table") == "head.modulation"
    assert official_name("blocks.7.norm2.bias") == "blocks.7.norm3.bias"
    assert official_name("vace_blocks.1.proj_out.weight") == "vace_blocks.1.after_proj.weight"
    assert official_name("blocks.0.of_nobody.weight") == "blocks.0.of_nobody.weight"


@pytest.mark.parametrize("prefix", ["", "transformer.", "model.diffusion_model."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_one_file(tmp_path, state, prefix, suffix):
    path = saved({prefix + n: t for n, t in renamed(state).items()}, tmp_path / f"x{suffix}")
    loaded, found = checkpoint.load(path)
    assert same(loaded, official(state))
    assert (found.has_sla, found.format, found.num_heads) == (True, "bf16", 2) and DIFFUSERS in found.notes


def test_the_image_branch_and_a_stock_model(tmp_path, state):
    state = image_branch(plain(state))
    loaded, found = checkpoint.load(saved(renamed(state), tmp_path / "x.safetensors"))
    assert same(loaded, official(state))
    assert (found.task, found.has_sla) == ("i2v", False)


@pytest.mark.parametrize("shards", [1, 2, 7])
def test_a_folder_and_its_index_are_one_model(tmp_path, state, shards):
    index = sharded(renamed(state), tmp_path / "a", shards)
    shutil.copytree(tmp_path / "a", tmp_path / "b" / "transformer")
    for path in (index, index.parent, tmp_path / "b"):
        loaded, found = checkpoint.load(path)
        assert same(loaded, official(state))
        assert found.notes == (f"{shards} shards", DIFFUSERS) and found.container == "safetensors"
        assert found.bytes == sum(file.stat().st_size for file in index.parent.iterdir())
        loaded["blocks.0.ffn.0.weight"].zero_()  # a private copy, as of a single file
    assert same(checkpoint.load(index)[0], official(state))


def test_shards_of_the_official_layout_are_read_too(tmp_path, state):
    index = sharded(official(state), tmp_path / "a")
    assert same(checkpoint.load(index)[0], official(state))
    assert DIFFUSERS not in checkpoint.inspect(index).notes


def test_a_folder_with_one_file_and_no_index(tmp_path, state):
    save_file(renamed(state), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert same(checkpoint.load(tmp_path)[0], official(state))


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links here")
def test_shards_may_be_links_as_in_the_hubs_cache(index, state, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for i, shard in enumerate(sorted(index.parent.glob("*.safetensors"))):
        shutil.move(shard, blobs / str(i))
        shard.symlink_to(blobs / str(i))
    assert same(checkpoint.load(index)[0], official(state))


@pytest.mark.parametrize("kind", ["int8_block", "int8_row"])
def test_the_int8_repack_is_multiplied_by_its_scale(tmp_path, state, kind):
    path = sharded(repacked(state, kind), tmp_path / "a")
    loaded, found = checkpoint.load(path)
    assert found.format == kind
    checkpoint.convert(saved(state, tmp_path / "x.pth"), tmp_path / "y.safetensors", kind)
    assert same(loaded, checkpoint.load(tmp_path / "y.safetensors")[0])


def test_row_scales_may_be_flat(tmp_path, state):
    tensors = {n: t.flatten() if n.endswith("_inv") else t for n, t in repacked(state, "int8_row").items()}
    assert checkpoint.inspect(saved(tensors, tmp_path / "x.safetensors")).format == "int8_row"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("stored", ["bf16", "int8_block"])
def test_converting_gives_what_converting_the_official_file_gives(tmp_path, state, format, stored):
    state = unquantized(state)
    ours = saved(state, tmp_path / "x.pth")
    if stored != "bf16":
        checkpoint.convert(ours, ours := tmp_path / "q.safetensors", stored)
    theirs = sharded(renamed(state) if stored == "bf16" else repacked(state, stored), tmp_path / "a")
    counts = []
    for source, target in ((ours, "ours"), (theirs, "theirs")):
        checkpoint.convert(source, tmp_path / f"{target}.safetensors", format, lambda *count: counts.append(count))
    assert same(load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs.safetensors"))
    assert counts[-1][0] == counts[-1][1]


def test_merging_takes_folders(tmp_path, state):
    base = plain(state)
    finetune = {n: (t.float() * 1.01).to(t.dtype) for n, t in base.items()}
    states = {"finetune": finetune, "base": base, "turbo": state}
    results = []
    for kind in ("files", "folders"):
        paths = []
        for name, content in states.items():
            path = tmp_path / f"{kind}-{name}"
            path = (
                saved(content, path.with_suffix(".pth")) if kind == "files" else sharded(renamed(content), path).parent
            )
            paths.append(path)
        target = tmp_path / f"{kind}.safetensors"
        checkpoint.merge(paths[0], paths[1], [paths[2]], target)
        results.append(load_file(target))
    assert same(*results) and f"blocks.0.{PROJ_L}.weight" in results[0]


def test_a_shard_is_never_overwritten_and_a_changed_one_is_told(index, tmp_path, monkeypatch):
    with pytest.raises(TurboError, match="never overwritten"):
        checkpoint.convert(index, index.with_name(SHARD.format(2)), "bf16")
    shard = index.with_name(SHARD.format(1))

    def touch(done, total):
        if done < total:
            os.utime(shard, ns=(1, 1))

    with pytest.raises(TurboError, match=f"{shard.name} changed while it was read"):
        checkpoint.convert(index, tmp_path / "x.safetensors", "bf16", touch)
    assert not (tmp_path / "x.safetensors").exists()


def rewrite(index, change):
    content = json.loads(index.read_text())
    index.write_text(json.dumps(change(content) or content))


def half(index, other):
    index.with_name(SHARD.format(2)).unlink()


def cut_short(index, other):
    path = index.with_name(SHARD.format(2))
    os.truncate(path, path.stat().st_size // 2)


def of_another_width(index, other):
    shutil.copy(other / SHARD.format(2), index.parent)


def of_another_kind(index, other):
    path = index.with_name(SHARD.format(2))
    save_file(load_file(path), path, {"format": "tf"})


def in_another_order(index, other):
    shutil.copy(index.with_name(SHARD.format(1)), index.with_name(SHARD.format(3)))


def with_one_more(index, other):
    path = index.with_name(SHARD.format(2))
    save_file(load_file(path) | {"extra": torch.ones(1)}, path, {"format": "pt"})


def one_name_twice(index, other):
    text = index.read_text().rstrip("}")
    index.write_text(f'{text}, "proj_out.bias": "{SHARD.format(1)}"}}}}')


def points(name):
    def change(index, other):
        shutil.copy(index.with_name(SHARD.format(1)), index.parent.parent / "x.safetensors")
        rewrite(index, lambda content: content["weight_map"].update({"proj_out.bias": name(index)}))

    return change


def content(text):
    return lambda index, other: index.write_bytes(text)


WRONG = {
    "half": (half, r"names 3 shards, of which 1 is not there: \S*00002-of-00003\.safetensors\. Download"),
    "cut short": (cut_short, r"00002-of-00003\.safetensors .*cut short"),
    "another width": (of_another_width, r"not of the same model as \S*00002-of-00003\.safetensors: blocks\.1\S* is"),
    "another kind": (of_another_kind, r"00002-of-00003\.safetensors is not of the same model.*metadata format is tf"),
    "another order": (in_another_order, r"00003-of-00003\.safetensors is not the shard that"),
    "one more": (with_one_more, r"00002-of-00003\.safetensors is not the shard.*holds extra"),
    "twice": (one_name_twice, "one name twice"),
    "outside": (points(lambda index: "../x.safetensors"), r"names \.\./x\.safetensors\. Expected.*refused"),
    "absolute": (points(lambda index: str(index.parent.parent / "x.safetensors")), "names /.*refused"),
    "Windows": (points(lambda index: "C:x.safetensors"), "names C:x.*refused"),
    "backslash": (points(lambda index: "..\\x.safetensors"), "names .*refused"),
    "itself": (points(lambda index: ".."), r"names \.\.\. Expected.*refused"),
    "pickle": (points(lambda index: "x.pth"), r"names x\.pth\. Expected \.safetensors.*refused"),
    "number": (points(lambda index: 3), "no index of shards.*weight_map"),
    "empty": (content(b""), "no index of shards"),
    "list": (content(b"[]"), "no index of shards.*weight_map"),
    "no map": (content(b'{"weight_map": {}}'), "no index of shards.*weight_map"),
    "deep": (content(b"[" * 100000), "no index of shards"),
    "bytes": (content(b"\xff\xfe\x00"), "no index of shards"),
}


@pytest.mark.parametrize("name", WRONG)
def test_shards_that_do_not_fit_are_refused_by_name(index, tmp_path, name):
    wider = TINY._replace(ffn_dim=640)
    other = sharded(renamed(tiny_state_dict(5, wider)), tmp_path / "other").parent
    change, words = WRONG[name]
    change(index, other)
    for call in (checkpoint.inspect, checkpoint.load):
        for path in (index, index.parent):
            with pytest.raises(TurboError, match=words):
                call(path)
    with pytest.raises(TurboError, match=words):
        checkpoint.convert(index, tmp_path / "out.safetensors", "bf16")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_shard_alone_names_the_index(index):
    for number in (1, 2, 3):
        with pytest.raises(TurboError, match=f"part 0000{number} of 00003: open {INDEX} beside it"):
            checkpoint.inspect(index.with_name(SHARD.format(number)))


def test_folders_that_hold_no_single_model(tmp_path, state):
    (tmp_path / "empty").mkdir()
    with pytest.raises(TurboError, match=r"is a folder without a \*\.safetensors\.index\.json"):
        checkpoint.inspect(tmp_path / "empty")
    for name in ("transformer", "transformer_2"):
        sharded(renamed(state), tmp_path / name)
    with pytest.raises(TurboError, match="two models, transformer and transformer_2"):
        checkpoint.inspect(tmp_path)
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, tmp_path / "empty" / f"{name}.safetensors")
    with pytest.raises(TurboError, match=r"2 models: a\.safetensors, b\.safetensors\. Name one"):
        checkpoint.inspect(tmp_path / "empty")
    with pytest.raises(TurboError, match="does not exist"):
        checkpoint.inspect(tmp_path / INDEX)


def test_two_layouts_in_one_file(tmp_path, state):
    """The official names win; what stands for the same layer twice is no part of a Wan model."""
    both = official(state) | {"blocks.0.attn1.to_q.weight": torch.ones(256, 256)}
    with pytest.raises(TurboError, match="not part of any Wan model"):
        checkpoint.inspect(saved(both, tmp_path / "x.safetensors"))
    theirs = renamed(state) | {"blocks.0.self_attn.q.weight": torch.ones(256, 256)}
    with pytest.raises(TurboError, match=r"two keys stand for blocks\.0\.self_attn\.q\.weight"):
        checkpoint.inspect(saved(theirs, tmp_path / "y.safetensors"))


def test_the_ten_linears_are_those_of_the_official_layout(state):
    assert sum(is_quantizable(official_name(name)) for name in renamed(state)) == 20


def test_animate_in_this_layout_is_told_and_not_taken_for_a_plain_model(tmp_path, state):
    """Its own parts have other names here, which no table translates: it would load as an I2V model."""
    theirs = renamed(state) | {"face_adapter.0.norm_k.weight": torch.ones(4)}
    save_file(theirs, tmp_path / "x.safetensors")
    with pytest.raises(TurboError, match=r"Wan Animate in Diffusers' layout.*original repository"):
        checkpoint.inspect(tmp_path / "x.safetensors")
