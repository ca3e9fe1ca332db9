"""How the files of the project hang together: what imports what, how long they are, and what each begins with."""
import ast
import importlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))}
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}


def file_table():
    """The rows of the README's table "Files", each a list of modules."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Files\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [re.findall(r"`(\w+)\.py`", cell) for cell in rows]


def imported(name):
    """The modules of the project that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import, in a project that is no package"
            found.add(node.module)
    return found & SOURCES.keys()


# Imports


def test_the_table_of_files_has_each_file_once():
    listed = [name for row in file_table() for name in row]
    assert sorted(listed) == sorted(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_down_the_table_of_files(name):
    rows = file_table()
    place = {module: number for number, row in enumerate(rows) for module in row}
    for other in imported(name):
        assert place[other] > place[name], f"{name}.py imports {other}.py, which is not further down"


@pytest.mark.parametrize("name", SOURCES)
def test_imports_name_what_they_take(name):
    stars = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
    assert not stars


@pytest.mark.parametrize("name", SOURCES)
def test_imports_come_in_their_order(name):
    """Standard library, third party, the project's own; in each first ``import``, then ``from``, then by name."""
    keys = []
    for node in TREES[name].body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.names[0].name if isinstance(node, ast.Import) else node.module
            root = module.partition(".")[0]
            origin = 0 if root in sys.stdlib_module_names else 2 if root in SOURCES else 1
            keys.append((origin, isinstance(node, ast.ImportFrom), module.lower()))
    assert keys == sorted(keys)


def test_what_needs_no_network_loads_no_pytorch():
    """PyTorch takes seconds to import. Each in turn, in a fresh process."""
    names = ("utils", "images", "metrics", "pairs", "rain")
    program = f"import sys\nfor name in {names}:\n    __import__(name)\n    print(name, 'torch' in sys.modules)"
    child = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert child.stdout.split("\n")[:-1] == [f"{name} False" for name in names]


# Sizes


@pytest.mark.parametrize("name", SOURCES)
def test_no_function_has_more_than_seven_parameters(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            given = node.args
            parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            names = [parameter.arg for parameter in parameters if parameter and parameter.arg not in ("self", "cls")]
            assert len(names) <= 7, f"{name}.py, line {node.lineno}: {', '.join(names)}"


def test_the_loop_has_a_file_that_is_soon_read():
    assert len(SOURCES["train"].splitlines()) < 400


@pytest.mark.parametrize("name", SOURCES)
def test_lines_fit(name):
    """A command in a docstring may be longer, as it must stay one line to be copied."""
    for number, line in enumerate(SOURCES[name].splitlines(), 1):
        assert len(line) <= 120 or line.startswith("    python "), f"{name}.py, line {number}"


# The command that each file begins with


def docstring_commands(name):
    """The commands of a docstring's first indented block, each a list of words."""
    block = re.search(r"\n\n((?:    .*\n)+)", ast.get_docstring(TREES[name], clean=False) + "\n")
    assert block, f"{name}.py: no command in its docstring"
    commands, text = [], ""
    for line in block[1].splitlines():
        text += line.removeprefix("    ")
        if text.endswith("\\"):
            text = text[:-1]
            continue
        try:
            commands.append(shlex.split(text))
            text = ""
        except ValueError:  # a quotation goes on in the next line
            text += "\n"
    assert not text
    return commands


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_begins_with_a_command_that_exists(name, tmp_path, monkeypatch, capsys):
    """Scripts take their options; what is given to python -c runs, in a folder like a fresh clone."""
    for folder in ("datasets", "results", "weights"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    commands = docstring_commands(name)
    for words in commands:
        if words[:2] == ["python", "-c"]:
            exec(compile(words[2], name, "exec"), {})
        elif words[0] == "python":
            script = words[1].removesuffix(".py")
            assert script in SOURCES, words
            monkeypatch.setattr(sys, "argv", words[1:])
            importlib.import_module(script).parse_args()
        else:
            assert words[:2] == ["pip", "install"], words
    assert name in USED_BY or any(re.search(rf"\b{name}\b", word) for words in commands for word in words)


# These have no command of their own and show that of a script which uses them.
USED_BY = {
    "comparison": "test", "inference": "test", "video": "test", "muon": "train", "training_sets": "train",
}


@pytest.mark.parametrize("name", USED_BY)
def test_a_file_without_a_command_shows_that_of_a_script_which_uses_it(name):
    assert any(f"{USED_BY[name]}.py" in words for words in docstring_commands(name))
    assert name in imported(USED_BY[name])


# The repository


def test_nothing_is_tracked_under_logs_but_its_readme():
    """Runs belong there, and the bundled weights to weights/."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so nothing is tracked")
    child = subprocess.run(["git", "ls-files", "logs"], cwd=ROOT, capture_output=True, text=True)
    if child.returncode:
        pytest.skip(f"git does not say what it tracks: {child.stderr.strip()}")
    assert child.stdout.split() == ["logs/README.md"]
