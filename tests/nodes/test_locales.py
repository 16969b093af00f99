"""Help pages and translations: every node, every input, four languages, nothing left in English by oversight.

locales/en is the recording of the real schemas (tests/host/test_locales_host.py); the sources are read here without
being imported, so that a forgotten recording shows without a host as well.
"""

import ast
import json
import re
from pathlib import Path

import pytest

from tests.helpers import workflow_api
from tests.tools.record_schemas import read
from turbo_core.diagnostics import cards

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "web" / "docs"
PICTURE_LIMIT = 60_000  # bytes; a help page is opened over slow networks too
LANGUAGES = "ko", "zh", "ja"
SCRIPTS = {"ko": "[가-힣]", "zh": "[一-鿿]", "ja": "[ぁ-ヿ一-鿿]"}
FOREIGN = {"ko": "[ぁ-ヿ一-鿿]", "zh": "[가-힣ぁ-ヿ]", "ja": "[가-힣]"}
SAME_IN_ALL = {"top-k", "Sigmas", "Latent A", "Latent B", "vae"}  # names that ComfyUI's own translations leave as well
ENGLISH_RUN = re.compile(r"(?:\b[a-z]{2,}[ ,]+){2}[a-z]{2,}\b")  # three English words in a row
FACT = re.compile(r'"[^"]+"|\b[\w./-]*[\d_/][\w./-]*\w|\.\w+\b')  # examples, numbers, paths, names of formats and files

EN = read("en")


def _texts(part, path=()):
    """{path: text} of everything in a nodeDefs.json."""
    if isinstance(part, str):
        return {path: part}
    return {deep: text for key, value in part.items() for deep, text in _texts(value, (*path, key)).items()}


def _calls():
    """Every call in nodes/*.py, as (file name, call)."""
    for path in sorted((ROOT / "nodes").glob("*.py")):
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(call, ast.Call):
                yield path.name, call


def _is(call, last):
    return isinstance(call.func, ast.Attribute) and call.func.attr == last


def _keywords(call):
    return {keyword.arg: keyword.value for keyword in call.keywords}


def _schemas():
    return [_keywords(call) for _, call in _calls() if _is(call, "Schema")]


NODES = sorted(schema["node_id"].value for schema in _schemas())


def test_every_input_has_a_tooltip():
    bare = [
        f"{name}:{call.lineno}" for name, call in _calls() if _is(call, "Input") and "tooltip" not in _keywords(call)
    ]
    assert not bare
    assert not [path for path, text in _texts(EN).items() if not text.strip()]


def test_recorded_english_is_that_of_the_sources():
    assert sorted(EN) == NODES
    for schema in _schemas():
        recorded = EN[schema["node_id"].value]
        assert recorded["display_name"] == schema["display_name"].value
        assert recorded["description"] == ast.literal_eval(schema["description"])
    written = [_keywords(call).get("tooltip") for _, call in _calls()]
    tooltips = {node.value for node in written if isinstance(node, ast.Constant)}
    assert tooltips <= set(_texts(EN).values()), "record again: see tests/tools/record_schemas.py"


def test_english_keeps_the_names_of_inputs():
    """A graph and its API form should read alike in English; a name in locales/en would hide the input's id."""
    for node in EN.values():
        renamed = {key: value["name"] for key, value in node["inputs"].items() if value["name"] != key}
        assert renamed in ({}, {"control_after_generate": "control after generate"})


@pytest.mark.parametrize("language", LANGUAGES)
def test_translation_is_complete(language):
    english, translated = _texts(EN), _texts(read(language))
    assert sorted(translated) == sorted(english)
    assert not [path for path, text in translated.items() if not text.strip()]


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_is_left_in_english(language):
    for path, text in _texts(read(language)).items():
        if text not in SAME_IN_ALL:
            assert re.search(SCRIPTS[language], text), f"{path}: {text}"
        assert not re.search(FOREIGN[language], text), f"{path} is of another language: {text}"
        assert not ENGLISH_RUN.search(text), f"{path}: {text}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_facts_survive_the_translation(language):
    """Numbers, examples, file names and formats of the English are in the translation; inputs under their new name."""
    for node_id, node in read(language).items():
        names = {key: value["name"] for key, value in node["inputs"].items()}
        texts = _texts(node)
        for path, english in _texts(EN[node_id]).items():
            if path[-1] not in ("tooltip", "description"):
                continue
            for fact in FACT.findall(english):
                wanted = {fact, fact.strip(".-"), names.get(fact, fact)}
                assert any(word in texts[path] for word in wanted), f"{node_id} {path}: {fact!r} not in {texts[path]}"


NOTES = json.loads((ROOT / "web" / "notes.json").read_text("utf-8"))
STARTS = [n["widgets_values"][0] for name in workflow_api.COMES_ALONG for n in workflow_api.load(name)["nodes"]
          if n["type"] == "MarkdownNote"]  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
def test_notes_of_the_start_workflows_are_translated(language):
    """By their English as it is now: web/templates.js finds them by that."""
    assert set(NOTES[language]) == set(STARTS), "translate the note again in web/notes.json"
    titles = {node["display_name"]: read(language)[name]["display_name"] for name, node in EN.items()}
    for english, text in NOTES[language].items():
        assert re.search(SCRIPTS[language], text) and not re.search(FOREIGN[language], text)
        assert len(re.findall("^## ", text, re.M)) == len(re.findall("^## ", english, re.M))
        prose, translated = ("\n".join(row for row in t.splitlines() if row[:1] != "|") for t in (english, text))
        for word in re.findall(r"\b[a-z]+_\w+|`[^`]+`|TinyWan|\b\d[\d.]*\b", prose):
            assert word in translated, f"{word} of {english[:40]!r}"
        rows, theirs = ([row for row in t.splitlines() if row[:1] == "|"] for t in (english, text))
        assert rows[1:] == theirs[1:], "the same table under a translated head"
        for title, shown in titles.items():
            if f"**{title}**" in english:
                assert shown in translated, f"{title} is called {shown} there"


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_readme_in_this_language(language):
    """Titles of nodes as the page shows them, the table of cards, and the workflows by their files."""
    text = (ROOT / "docs" / f"README.{language}.md").read_text("utf-8")
    assert re.search(SCRIPTS[language], text) and not re.search(FOREIGN[language], text.split("\n", 3)[3])
    for node in read(language).values():
        assert f"| **{node['display_name']}** |" in text
    for row in cards.table().splitlines()[2:]:
        assert row in text
    assert {name for name in workflow_api.names() if f"workflows/{name}.json" in text} == set(workflow_api.names())


@pytest.mark.parametrize("language", ("en", *LANGUAGES))
def test_texts_are_plain_for_the_page(language):
    """The page reads names and descriptions as message formats: braces, pipes and at signs mean something there."""
    assert not [path for path, text in _texts(read(language)).items() if re.search(r"[{}|@]", text)]


@pytest.mark.parametrize("language", ("en", *LANGUAGES))
@pytest.mark.parametrize("node_id", NODES)
def test_help_page(node_id, language):
    page = DOCS / f"{node_id}.md" if language == "en" else DOCS / node_id / f"{language}.md"
    text, node = page.read_text("utf-8"), read(language)[node_id]
    assert text.splitlines()[0] == f"# {node['display_name']}"
    told = re.findall(r"^- \*\*([^*]+)\*\*", text, re.M)  # a list where the narrow panel breaks words anywhere
    told += [name.strip() for row in re.findall(r"^\| ([^|]+)\|", text, re.M) for name in row.split(",")]
    inputs = {value["name"] for key, value in node["inputs"].items() if key != "control_after_generate"}
    assert inputs <= set(told), f"{page.name} does not tell about {inputs - set(told)}"
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert f"images/{node_id}.webp" in pictures, "the page resolves pictures from web/docs, in every language"
    for picture in pictures:
        assert 0 < (DOCS / picture).stat().st_size < PICTURE_LIMIT
    if language != "en":
        assert not ENGLISH_RUN.search(re.sub(r"\([^)]*\)|`[^`]*`", "", text)), f"English left in {page}"


def test_no_page_or_picture_without_a_node():
    pages = {path.stem for path in DOCS.glob("*.md")} | {path.name for path in DOCS.iterdir() if path.is_dir()}
    assert pages == {*NODES, "images"}
    shown = {name for page in DOCS.rglob("*.md") for name in re.findall(r"images/([\w.]+)", page.read_text("utf-8"))}
    assert {path.name for path in (DOCS / "images").iterdir()} == shown
