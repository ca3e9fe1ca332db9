"""The README says what the scripts do."""
import re

import pytest

import export
import rain
import test as test_script
import train
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def documented(heading):
    """{option: default as text} of the option table under a heading of the README."""
    section = README.split(f"\n### {heading}\n", 1)[1].split("\n#", 1)[0]
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
        if action.dest == "help":
            continue
        default = "" if action.default is None else action.default
        if isinstance(default, list):
            default = " ".join(map(str, default))
        shown[action.option_strings[-1]] = f"`{default}`" if str(default) else ""
    return shown


@pytest.mark.parametrize(
    "heading, script",
    [
        ("Options of train.py", train), ("Options of test.py", test_script), ("Options of export.py", export),
        ("Options of rain.py", rain),
    ],
)
def test_option_tables_match_the_parsers(heading, script, monkeypatch):
    assert documented(heading) == actual(script.parse_args, monkeypatch)


def test_commands_name_files_and_options_that_exist(monkeypatch):
    commands = re.findall(r"^(?:python|torchrun\b.*?) (\w+\.py)(.*)$", README, re.MULTILINE)
    assert len(commands) >= 6
    for script, arguments in commands:
        module = __import__(script.removesuffix(".py"))
        with monkeypatch.context() as patch:
            known = actual(module.parse_args, patch)
        assert set(re.findall(r"--\w+", arguments)) <= set(known), script


def test_images_and_files_named_in_the_readme_exist():
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target
