"""TurboCompare in the host: what it measures of models that are equal, quantized, sparse, and of different kinds."""

import math

import pytest
import torch

from tests.helpers.lab import HIGH, STOCK


@pytest.fixture
def compare(lab, pack, monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))  # of the preview

    def run(a, b, steps=2, latent=None, **settings):
        node, settings = pack.nodes["TurboCompare"], {"seed": 3, "positive": lab.positive(), **settings}
        return node.execute(a, b, latent_image=latent or lab.latent(), steps=steps, **settings)

    return run


def table(output):
    """[[x0, first, middle, last, kept, least head] of each step], in shares; nan for "-"."""
    rows = output[1].split("least head\n")[1].split("\n\n")[0].replace(" %", "").splitlines()
    return [[math.nan if cell == "-" else float(cell) / 100 for cell in row.split()[2:]] for row in rows]


def by_topk(output):
    """{top-k: kept mean}"""
    rows = output[1].split("least block\n")[1].split("\n\n")[0].splitlines()
    return {float(row.split()[0]): float(row.split()[1]) / 100 for row in rows}


def test_model_against_itself_has_no_error(lab, compare):
    model = lab.dense(lab.load())
    output = compare(model, model)
    assert table(output) == [[0, 0, 0, 0, 1, 1]] * 2
    assert torch.equal(output[2]["samples"], output[3]["samples"])


def test_reference_run_is_the_samplers_run(lab, compare):
    model = lab.load()
    for mode, seed in (("SDE", 3), ("ODE", 3), ("SDE", 2**64 - 1)):
        output = compare(model, lab.dense(model), steps=3, mode=mode, seed=seed)
        assert torch.equal(output[2]["samples"], lab.turbo(model, steps=3, mode=mode, seed=seed))


def test_a_part_of_the_steps_ends_in_what_b_sees_in_the_last_state(lab, compare):
    """As for one expert: the host divides what a sampler gives by what noise has left of it, 9.74 times too much."""
    model, sigmas = lab.load(), torch.tensor([0.98, 0.95, 0.9])
    output = compare(model, model, mode="ODE", sigmas=sigmas)
    seen = lab.turbo(model, mode="ODE", sigmas=torch.cat([sigmas[:2], torch.zeros(1)]))
    torch.testing.assert_close(output[3]["samples"], seen, rtol=1e-3, atol=1e-3)


def test_error_is_that_of_whole_block_outputs(lab, compare):
    """With all tokens compared, the last block's error is that of forward hooks on the network itself."""
    a = lab.dense(lab.load())
    b = lab.attention(a, 0.3, mode="sparse only")
    output = compare(a, b, steps=1, tokens=8192)
    seen = []
    handle = a.model.diffusion_model.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    try:
        lab.turbo(a, steps=1)
        lab.turbo(b, steps=1)
    finally:
        handle.remove()
    expected = lab.distance(seen[1], seen[0])
    assert table(output)[0][3] == pytest.approx(expected, abs=1e-4) and expected > 0.001


def test_sampled_tokens_tell_about_the_same(lab, compare):
    a = lab.dense(lab.load())
    b = lab.quantize(a)
    few, all_of_them = (table(compare(a, b, steps=1, tokens=tokens))[0] for tokens in (64, 8192))
    assert few[0] == all_of_them[0], "x0 is compared whole"
    assert few[3] == pytest.approx(all_of_them[3], rel=0.2) and few[1:] != all_of_them[1:]


def test_quantized_against_float_is_a_small_error(lab, compare):
    a = lab.dense(lab.load())
    output = compare(a, lab.quantize(a))
    for x0, first, _, last, kept, _ in table(output):
        assert 1e-3 < x0 < 0.2 and 1e-4 < first < 0.1 and 1e-4 < last < 0.2 and kept == 1
    assert "float32 in 20; dense" in output[1] and "int8_block in 20; dense" in output[1]
    assert "keeps least" not in output[1]


def test_sparse_keeps_less_and_errs_more_with_smaller_topk(lab, compare):
    model = lab.load()
    dense = lab.dense(model)
    outputs = [compare(dense, lab.attention(model, topk, mode="sparse only")) for topk in (0.2, 0.5, 1.0)]
    last = [table(output)[0] for output in outputs]
    assert last[0][3] > last[1][3] > last[2][3] and last[2][3] < 1e-4
    assert last[0][4] < last[1][4] < last[2][4] == 1 and last[0][5] <= last[0][4]
    assert last[0][4] > 0 and "keeps least in blocks" in outputs[0][1]


def test_kept_mass_of_the_settings_is_that_of_the_row_of_the_same_topk(lab, compare):
    model = lab.load()
    output = compare(lab.dense(model), lab.attention(model, 0.3))
    means = [row[4] for row in table(output)]
    assert sum(means) / 2 == pytest.approx(by_topk(output)[0.3], abs=2e-4)
    assert list(by_topk(output).values()) == sorted(by_topk(output).values())


def test_blocks_that_stay_dense_keep_all(lab, compare):
    model = lab.load()
    output = compare(lab.dense(model), lab.attention(model, 0.2, dense_blocks="0"), steps=1)
    rows = output[1].split("kept at each step\n")[1].splitlines()
    kept = [float(row.split()[3]) for row in rows]
    assert kept[0] == 100 and kept[1] < 100 and "keeps least in blocks 1:" in output[1]


def test_recall_of_a_stock_model_under_the_override(comfy, lab, compare):
    """Training-free sparsity has another way to the attention, and the same numbers must come out."""
    stock = comfy.sd.load_diffusion_model(lab.path(STOCK))
    output = compare(stock, lab.attention(stock, 0.3), steps=1)
    assert 0 < table(output)[0][4] < 1 and table(output)[0][4] == pytest.approx(by_topk(output)[0.3], abs=2e-4)
    assert "sparse, without a linear branch, top-k 0.3" in output[1]


def test_picture(lab, compare, tmp_path):
    model = lab.load()
    output = compare(lab.dense(model), lab.attention(lab.quantize(model), 0.3, "int8"), steps=4)
    picture = output[0]
    assert picture.ndim == 4 and picture.shape[0] == 1 and picture.shape[3] == 3 and picture.dtype == torch.float32
    assert 0 <= picture.min() < 0.3 and picture.max() == 1 and len(picture.flatten(0, 2).unique(dim=0)) > 100
    shown = output.ui["images"]
    assert [(tmp_path / image["filename"]).is_file() for image in shown] == [True]


def test_image_to_video_with_two_videos_at_once(lab, compare):
    model = lab.load(HIGH)
    shape = (2, *lab.shape[1:])
    extra = {"concat_latent_image": lab.draw(1, 16, *shape[2:], seed=5), "concat_mask": torch.ones(1, 1, *shape[2:])}
    dense, sparse = lab.dense(model), lab.attention(model, 0.2)
    output = compare(dense, sparse, latent=lab.latent(shape), positive=lab.positive(**extra))
    assert all(0 < row[0] < 1 and 0 < row[4] < 1 for row in table(output))
    assert output[2]["samples"].shape == shape


def test_image_to_video_without_a_picture_is_refused(lab, compare):
    model = lab.load(HIGH)
    with pytest.raises(ValueError, match="got no picture"):
        compare(model, model)


def test_sigmas_take_the_place_of_steps(lab, compare):
    model = lab.load()
    output = compare(model, model, steps=4, sigmas=torch.tensor([0.9, 0.5, 0.0]))
    assert len(table(output)) == 2 and "  0.9000 " in output[1]
    with pytest.raises(ValueError, match="Turbo Scheduler"):
        compare(model, model, sigmas=torch.tensor([0.0, 1.0]))


def test_models_of_two_families_are_refused(lab, compare):
    with pytest.raises(ValueError, match=r"one family.*\(256, 2, 2, 16\) and \(256, 2, 2, 36\)"):
        compare(lab.load(), lab.load(HIGH))


def test_models_are_left_as_they_were(lab, compare):
    model = lab.load()
    before = lab.denoise(model)
    compare(lab.dense(model), lab.attention(model, 0.2))
    assert "patches" not in model.model_options["transformer_options"]
    assert torch.equal(lab.denoise(model), before)


def test_patches_of_other_nodes_are_seen_and_kept(lab, compare):
    """Another node's patch on the block outputs acts before they are compared."""
    a = lab.dense(lab.load())
    b = a.clone()
    b.set_model_double_block_patch(lambda args: {"img": args["img"] * 1.5})
    assert table(compare(a, b, steps=1))[0][1] == pytest.approx(0.5, abs=1e-4)
