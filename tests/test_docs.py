"""README.md and docs/ say what the scripts do."""
import re

import pytest

import export
import rain
import test as test_script
import train
from conftest import ROOT

PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def documented(script):
    """{option: default as text} of the option table of a script in docs/options.md."""
    section = PAGES[ROOT / "docs/options.md"].split(f"\n## {script}\n", 1)[1].split("\n#", 1)[0]
    return dict(re.findall(r"^\| `(--\w+)` \| (.*?) \|", section, re.MULTILINE))


def actual(parse_args, monkeypatch):
    """{option: default as text} of a script's parser."""
    parsers = []

    def capture(parser, argv=None):
        parsers.append(parser)
        raise SystemExit

    monkeypatch.setattr("argparse.ArgumentParser.parse_args", capture)
    with pytest.raises(SystemExit):
        parse_args()
    shown = {}
    for action in parsers[0]._actions:
        if action.dest == "help" or not action.option_strings:
            continue
        default = "" if action.default is None else action.default
        if isinstance(default, list):
            default = " ".join(map(str, default))
        shown[action.option_strings[-1]] = f"`{default}`" if str(default) else ""
    return shown


@pytest.mark.parametrize("script", [train, test_script, export, rain])
def test_option_tables_match_the_parsers(script, monkeypatch):
    assert documented(f"{script.__name__}.py") == actual(script.parse_args, monkeypatch)


def test_commands_name_files_and_options_that_exist(monkeypatch):
    text = "\n".join(PAGES.values())
    commands = re.findall(r"^(?:python|torchrun\b.*?) (\w+\.py)(.*)$", text, re.MULTILINE)
    assert len(commands) >= 20
    for script, arguments in commands:
        module = __import__(script.removesuffix(".py"))
        with monkeypatch.context() as patch:
            known = actual(module.parse_args, patch)
        assert set(re.findall(r"--\w+", arguments)) <= set(known), script


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_images_and_files_named_in_a_page_exist(page):
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", PAGES[page]):
        assert (page.parent / target).exists(), target
