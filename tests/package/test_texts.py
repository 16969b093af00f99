"""What README, CONTRIBUTING and the pages beside them say is true of this tree: links, paths, commands, figures."""

import json
import re
from pathlib import Path

import pytest

from turbo_core.cli import main
from turbo_core.diagnostics import cards

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(p for where in ("*.md", "[bdmtw]*/**/*.md") for p in ROOT.glob(where))  # no environment begins so
README = (ROOT / "README.md").read_text(encoding="utf-8")


def named(page):
    return page.relative_to(ROOT).as_posix()


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_pages_are_found():
    assert {"README.md", "CONTRIBUTING.md", "docs/testing.md", "models/tinywan/README.md"} <= set(map(named, PAGES))


@pytest.mark.parametrize("page", [p for p in PAGES if "web" not in p.parts], ids=named)  # the host resolves help's own
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_that_are_named_are_there(page):
    """A module that moved takes its name in the texts along."""
    known = r"(?:turbo_core|nodes|kernels|tests|benchmarks|models/tinywan|web/docs)"
    for path in re.findall(rf"(?<![\w/.]){known}/[\w./]*\w", page.read_text(encoding="utf-8")):
        if not re.search(r"NAME|NodeId", path):
            assert (ROOT / path).exists(), path


def found(parts):
    """True where a dotted name is a module of the tree, or a name that is written in one."""
    for i in range(len(parts), 0, -1):
        for file in (ROOT.joinpath(*parts[:i]).with_suffix(".py"), ROOT.joinpath(*parts[:i], "__init__.py")):
            if file.is_file():
                words = re.findall(r"\w+", file.read_text(encoding="utf-8"))
                return set(parts[i:]) <= set(words)
    return False


@pytest.mark.parametrize("folder", ["nodes", "turbo_core", "kernels", "pages"])
def test_modules_that_are_named_are_there(folder):
    files = PAGES if folder == "pages" else sorted((ROOT / folder).rglob("*.py"))
    assert len(files) > 10
    for file in files:
        for name in re.findall(r"\bturbo_core(?:\.[A-Za-z_]\w*)+", file.read_text(encoding="utf-8")):
            parts = name.removeprefix("turbo_core.kernels.").split(".")
            assert found(parts if parts[0] == "turbo_core" else ["kernels", *parts]), f"{named(file)}: {name}"


def test_commands_are_verbs_of_turbo_core(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    verbs = re.findall(r"^    ([a-z-]+)\b", capsys.readouterr().out, re.MULTILINE)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        said = re.findall(r"(?:^turbo-core|`turbo-core|-m turbo_core) ([a-z][a-z-]+)\b", text, re.MULTILINE)
        assert set(said) <= set(verbs), named(page)
    assert {"generate", "plan", "tinywan"} <= set(verbs)


def test_every_node_is_in_the_readme_by_its_title():
    nodes = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert len(nodes) > 10
    for node in nodes.values():
        assert f"| **{node['display_name']}** |" in README


def test_which_file_for_which_card_is_what_doctor_says():
    """One source for README, the note of the first workflow and Turbo Doctor."""
    note = (ROOT / "workflows" / "00_start_here.json").read_text(encoding="utf-8")
    for table in (cards.table(), cards.settings()):
        assert table in README, "README lacks a table of turbo_core.diagnostics.cards"
    assert json.dumps(cards.settings())[1:-1] in note


def test_the_quality_table_is_of_the_report():
    report = (ROOT / "benchmarks" / "results" / "tinywan" / "quality.md").read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines()[2:]]
    of = {row[0]: row for row in cells}
    for name, ours in {
        "teacher, 50 steps, guidance 3": "teacher, 50 steps, guidance 3",
        "teacher, 4 steps, guidance 3": "teacher, 4 steps, guidance 3",
        "rCM, 4 steps": "rCM, 4 steps, no guidance",
        "rCM, 2 steps": "rCM, 2 steps",
        "rCM, 1 step": "rCM, 1 step",
        "rCM 4 + SLA top-k 0.15": "rCM 4 + SLA, top-k 0.15",
        "rCM 4 + W8A8 block": "rCM 4 + W8A8, blocks",
        "rCM 4 + SageSLA 0.15 + W8A8 block": "rCM 4 + SageSLA 0.15 + W8A8, blocks",
        "I2V, 4 steps, SLA top-k 0.15": "image to video, two experts: 4 steps + SLA 0.15",
    }.items():
        share = round(float(of[name][1].rstrip("%")))
        interval, points, seconds = of[name][2].rstrip("%"), of[name][8], of[name][11]
        points = points if "rCM" in name else "-"
        assert f"| {ours} | {share} % ({interval}) | {points} | {seconds} |" in README


def test_the_drawing_shows_every_room():
    drawing = (ROOT / "docs" / "house.svg").read_text(encoding="utf-8")
    names = {word for text in re.findall(r'class="name"[^>]*>([^<]+)<', drawing) for word in text.split()}
    rooms = {f"{p.name}/" for p in (ROOT / "turbo_core").iterdir() if (p / "__init__.py").is_file()}
    files = {p.stem for p in (ROOT / "turbo_core").glob("*.py") if not p.stem.startswith("__")}
    inner = {f"nodes/{p.name}/" for p in (ROOT / "nodes").iterdir() if (p / "__init__.py").is_file()}
    assert names == rooms | files | inner | {"nodes/", "nodes/*.py", "turbo_core/", "kernels/"}
