"""TurboPrompt: whole sentences of what was chosen, or what a language model of the host writes."""

import io

import pytest
import torch


@pytest.fixture
def prompt(pack):
    return lambda *given, **named: pack.nodes["TurboPrompt"].execute(*given, **named)


def test_without_a_language_model_it_adds_what_was_chosen_and_nothing_else(prompt):
    for idea in ("a red  fox\ntrots", "a red fox trots."):
        made = prompt(idea)
        assert made[0] == "a red fox trots."
        assert "trained on 80 to 120" in made.ui["text"][0]
    made = prompt("A fox!", "still", "night", "film")
    text = made[0]
    assert text.startswith("A fox! The camera does not move. Night, ") and text.endswith("fine grain.")
    long = prompt("word " * 80)
    assert long.ui["text"] == (long[0],), "no advice where there are words enough"
    for empty in ("", " \n", None):
        with pytest.raises(ValueError, match="idea is empty"):
            prompt(empty)


class Writer:
    """A CLIP of the host's kind that writes: the same calls as the host's Generate Text makes."""

    def __init__(self, answer):
        self.answer, self.asked = answer, None

    def tokenize(self, text, skip_template, min_length, **more):
        return [text]

    def generate(self, tokens, do_sample, max_length, seed, **more):
        self.asked = tokens[0], max_length, seed
        return [1]

    def decode(self, ids):
        return self.answer


def test_a_language_model_gets_the_task_and_its_answer_is_one_paragraph(prompt):
    writer = Writer('<think>\nhm</think>\n"A fox runs.\n\nIt snows."')
    made = prompt("a fox", "still", clip=writer, max_length=200, seed=5)
    assert made[0] == "A fox runs. It snows." and made.ui["text"] == (made[0],)
    task, *rest = writer.asked
    assert task.endswith("Idea: a fox. The camera does not move.") and rest == [200, 5]
    for silent in ("", "<think>never done"):
        with pytest.raises(ValueError, match="wrote nothing"):
            prompt("a fox", clip=Writer(silent))


@pytest.fixture
def gemma(comfy):
    """A Gemma 2 of the host's, three small layers with random weights."""
    trainer, model = pytest.importorskip("sentencepiece").SentencePieceTrainer, io.BytesIO()
    words = iter(["a fox trots through fresh snow and looks back once", "the camera moves slowly closer to it"] * 20)
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    trainer.train(sentence_iterator=words, model_writer=model, vocab_size=60, model_type="bpe", minloglevel=2, **ids)
    spiece = torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 60}
    mark = "model.layers.0.post_feedforward_layernorm.weight"
    clip = comfy.sd.load_text_encoder_state_dicts(
        [{"spiece_model": spiece, mark: torch.zeros(64)}],
        clip_type=comfy.sd.CLIPType.LUMINA2,
        model_options={"gemma2_2b_model_config": sizes},
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in clip.cond_stage_model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return clip


def test_a_gemma_of_the_host_writes_what_its_own_node_would(comfy, pack, prompt, gemma):
    from comfy_extras.nodes_textgen import TextGenerate

    part = pack.part("nodes.text")
    made = prompt("a fox", clip=gemma, max_length=24, seed=7)[0]
    sampling = {"sampling_mode": "on", "seed": 7, **part.SAMPLED}
    theirs = TextGenerate.execute(gemma, part.TASK + "a fox.", 24, sampling)[0]
    assert made and made == " ".join(theirs.split()).strip("\"'` ")
    assert prompt("a fox", clip=gemma, max_length=24, seed=8)[0] != made


def test_an_encoder_that_only_reads_is_named(pack, tiny, prompt):
    clip = pack.loading.load_text_encoder(str(tiny / "tiny_umt5.safetensors"))
    with pytest.raises(ValueError, match="reads text and writes none: load a language model"):
        prompt("a fox", clip=clip)


def test_its_seed_stays_where_nobody_changes_it(pack):
    """One that changes after each run would have all that follows run again, without a language model too."""
    seeds = [given for given in pack.nodes["TurboPrompt"].GET_SCHEMA().inputs if given.id == "seed"]
    assert [seed.control_after_generate for seed in seeds] == [None]
