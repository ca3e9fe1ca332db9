"""README.md and docs/ say what the scripts do, and the commands that they show work."""
import argparse
import hashlib
import importlib
import re
import shlex
import shutil
import sys

import cv2
import pytest
from torch.distributed.run import get_args_parser

from conftest import ROOT, make_pairs, photo, save, with_rain

PAGES = {
    str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
}
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
COMMAND = re.compile(r"(?:^|`)((?:python \w+\.py|torchrun |bash main\.sh)[^`\n]*)", re.MULTILINE)
# Appended to a command that is run, so that it takes a second; bench.py and rain_stats.py have tests of their own.
TINY = {
    "train": "--max_steps 1 --recurrent_iter 2 --patch_size 33 --stride 33 --batch_size 2 --num_workers 0 --device cpu"
    " --backbone_weights random --seg_backbone resnet18",
    "test": "--device cpu", "rain": "--per_image 2", "export": "", "curve": "", "pairs": "",
}


def commands(text):
    """[(what starts it, script, [argument, ...])] of the commands that a text shows, in their order."""
    found = []
    for line in COMMAND.findall(text):
        words = shlex.split(line)
        if words[0] == "torchrun":
            options = get_args_parser().parse_args(words[1:])
            words = ["torchrun", options.training_script, *options.training_script_args]
        script = "test" if words[1] == "main.sh" else words[1].removesuffix(".py")
        found.append((words[0], script, words[2:]))
    return found


def shown_commands():
    """(script, arguments) of the commands of all pages, each once."""
    shown = [(script, arguments) for text in PAGES.values() for _, script, arguments in commands(text)]
    return [command for number, command in enumerate(shown) if command not in shown[:number]]


def parser_of(script, monkeypatch):
    """The ``ArgumentParser`` of a script, None if it has none."""
    module, parsers = importlib.import_module(script), []
    if not hasattr(module, "parse_args"):
        return None

    def capture(parser, *_):
        parsers.append(parser)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", capture)
        with pytest.raises(SystemExit):
            module.parse_args()
    return parsers[0]


def option_table(parser):
    """The rows of docs/options.md for a parser: what --help says."""
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for action in parser._actions:
        if action.dest == "help" or not action.option_strings:
            continue
        default = "" if action.default in (None, []) else action.default
        default = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        meaning = action.help.replace("%(default)s", default).replace(f" (default: {default})", "")
        if action.choices:
            meaning += f" ({', '.join(action.choices)})"
        lines.append(f"| `{action.option_strings[-1]}` | {f'`{default}`' if default else ''} | {meaning} |")
    return "\n".join(lines)


@pytest.mark.parametrize("script", ["train", "test", "rain", "export", "detect", "app"])
def test_option_tables_are_those_of_the_parsers(script, monkeypatch):
    expected = f"\n## {script}.py\n\n{option_table(parser_of(script, monkeypatch))}\n"
    assert expected in PAGES["docs/options.md"], f"expected:\n{expected}"


@pytest.mark.parametrize(
    ("script", "arguments"), shown_commands(),
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60],
)
def test_a_command_shown_is_accepted(script, arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    importlib.import_module(script).parse_args()


def test_options_named_in_the_text_exist(monkeypatch):
    parsers = [parser_of(script, monkeypatch) for script in SCRIPTS]
    known = {name for parser in parsers if parser for action in parser._actions for name in action.option_strings}
    known |= {name for action in get_args_parser()._actions for name in action.option_strings}
    for page, text in PAGES.items():
        named = {name for code in re.findall(r"`([^`]+)`", text) for name in re.findall(r"(?<!\S)--\w+", code)}
        assert named <= known | {name.replace("-", "_") for name in known}, page


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_a_page_exist(page):
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", PAGES[page]):
        assert ((ROOT / page).parent / target).exists(), target
    for target in re.findall(r"`((?:docs|results|tests|weights)/[\w./]+\.\w+|\w+\.(?:py|sh))`", PAGES[page]):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("page", [*PAGES, "weights/README.md", "datasets/README.md", "results/README.md"])
def test_prose_fits(page):
    """A command and a row of a table must stay one line."""
    text = (ROOT / page).read_text()
    prose = "".join(part for number, part in enumerate(text.split("```")) if number % 2 == 0)
    assert not [line for line in prose.splitlines() if len(line) > 120 and not line.startswith("|")]


def test_the_checksums_of_the_bundled_weights_are_right():
    text = (ROOT / "weights/README.md").read_text()
    for path in (ROOT / "weights").glob("*.pth"):
        assert path.name in text and hashlib.sha256(path.read_bytes()).hexdigest() in text, path.name


# Running what is shown


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """The working directory: as after cloning and getting the data, but with two or three small images a folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "weights", "weights")
    for name in ("RainTrainH", "RainTrainL"):
        make_pairs(tmp_path / "datasets/train" / name)
    make_pairs(tmp_path / "datasets/train/RainHeavy", (11, 12))
    make_pairs(tmp_path / "datasets/val/RainHeavy", (13,))
    for name in ("Rain100H", "Rain100L", "RainSample"):
        for number in (4, 5):
            save(f"datasets/test/{name}/norain-00{number}.png", photo(number))
            save(f"datasets/test/{name}/rainy/rain-00{number}.png", with_rain(photo(number)))
    for number in (6, 7):
        save(f"datasets/train/Photographs/{number}.jpg", photo(number, 96, 128))  # shrunk, they must hold a patch
        save(f"photos/{number}.jpg", photo(number))
    save("datasets/test/Photographs/8.jpg", photo(8))
    save("photo.jpg", photo(9))
    clip = cv2.VideoWriter("clip.mp4", cv2.VideoWriter_fourcc(*"mp4v"), 25, (64, 48))
    for number in (10, 11):
        clip.write(photo(number))
    clip.release()
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if commands(text)])
def test_the_commands_of_a_page_run_one_after_the_other(page, clone, run):
    """All but those that name a placeholder such as DIR, those of torchrun, and those of scripts not in ``TINY``."""
    for starter, script, arguments in commands(PAGES[page]):
        if starter != "python" or script not in TINY or any(re.fullmatch("[A-Z_]+", word) for word in arguments):
            continue
        tiny = TINY[script].split() + (["--val_pairs", "1"] if "--val_pairs" in arguments else [])
        result = run(script, *arguments, *tiny)
        assert result.status == 0, (script, arguments, result)
