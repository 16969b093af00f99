"""TinyWan's training data: several parts as one, encoded by as many processes as there are."""

import torch

from turbo_core.tinywan import recipe
from turbo_core.tinywan.data import joined
from turbo_core.train import data


def test_joined_data_keep_every_clips_captions():
    def part(count, tokens, first):
        text = torch.full((1 + 2 * count, tokens, 3), float(first))
        latents = torch.full((count, 16, 2, 4, 4), float(first))
        captions = 1 + torch.arange(2 * count).view(count, 2)
        return data.Data(latents, text, torch.full((1 + 2 * count,), tokens), captions)

    whole = joined([part(2, 5, 1), part(3, 7, 2)])
    assert whole.latents.shape[0] == 5 and whole.text.shape == (5 + 7, 7, 3)
    for latent, captions in zip(whole.latents, whole.captions_of):
        for row in captions:
            assert (whole.text[row][: whole.lengths[row]] == latent.flatten()[0]).all()


def test_processes_share_the_encoding_and_a_kill_costs_one_part(tmp_path, monkeypatch):
    made = []

    def make(codec, encoder, tokenize, count, seed):
        made.append(seed)
        latents = torch.full((count, 16, 2, 4, 4), float(seed))
        text = torch.full((1 + count, 5, 3), float(seed))
        return data.Data(latents, text, torch.full((1 + count,), 5), 1 + torch.arange(count)[:, None])

    monkeypatch.setattr(recipe.data, "make_clips", make)
    monkeypatch.setattr(recipe, "load_vae", lambda path, dtype: None)
    monkeypatch.setattr(recipe, "load_text_encoder", lambda path, dtype: (None, None))
    monkeypatch.setattr(recipe.engine, "processes", lambda: 2)
    sizes, target = {"count": 250}, tmp_path / "data.safetensors"

    def encode(rank):
        monkeypatch.setattr(recipe.engine, "rank", lambda: rank)
        recipe._encode({"vae": "", "text": ""}, target, sizes, 0, lambda line: None)

    encode(1)
    assert made == [1] and not target.exists()
    monkeypatch.setattr(recipe.engine, "processes", lambda: 1)  # killed, and started again with one
    encode(0)
    assert sorted(made) == [0, 1, 2] and list(tmp_path.iterdir()) == [target]
    whole = data.load(target)
    assert whole.latents[:, 0, 0, 0, 0].tolist() == [0.0] * 100 + [1.0] * 100 + [2.0] * 50
    assert (whole.text[whole.captions_of[:, 0], 0, 0] == whole.latents[:, 0, 0, 0, 0]).all()
