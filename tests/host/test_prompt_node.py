"""TurboPrompt: whole sentences of what was chosen, or what a language model of the host writes."""

import pytest


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


def test_the_calls_are_those_of_the_hosts_own_node(comfy, pack):
    """Generate Text of this host asks the same CLIP for the same three things."""
    from comfy_extras.nodes_textgen import TextGenerate

    writer = Writer("done")
    sampling = {"sampling_mode": "on", "seed": 7}
    assert TextGenerate.execute(writer, "task", 64, sampling)[0] == "done"
    assert writer.asked == ("task", 64, 7)


def test_an_encoder_that_only_reads_is_named(pack, tiny, prompt):
    clip = pack.loading.load_text_encoder(str(tiny / "tiny_umt5.safetensors"))
    with pytest.raises(ValueError, match="reads text and writes none: load a language model"):
        prompt("a fox", clip=clip)
