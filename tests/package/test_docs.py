"""README, CONTRIBUTING and docs/: Python blocks run, commands parse, paths, links and options exist, and nothing is missing."""

import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
FRONT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = [*FRONT, ROOT / "examples/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = ("stmae/**/*.py", "kernels/**/*.py", "training/**/*.py", "csrc/**/*.cpp", "csrc/**/*.h", "setup.py", "Makefile")
BESIDE_TRAINING = ["av", "jsonargparse", "matplotlib", "numpy", "PIL", "yaml", "safetensors", "tensorboard", "tqdm"]


def name(page):
    return str(page.relative_to(ROOT))


def made(page):
    """Files that the page tells its reader to make."""
    return re.findall(r"^In `([^`]+)`:$", page.read_text(), re.MULTILINE)


MADE = [path for page in PAGES for path in made(page)]
each_page = pytest.mark.parametrize("page", PAGES, ids=name)


def blocks(page):
    """[(line, language, text)] of the fenced blocks."""
    found, lines = [], page.read_text().split("\n")
    opened = None
    for number, line in enumerate(lines, 1):
        if line.startswith("```"):
            if opened is None:
                opened = number
            else:
                found.append((opened, lines[opened - 1][3:].strip(), "\n".join(lines[opened : number - 1])))
                opened = None
    assert opened is None, f"{name(page)}:{opened}: a block that is not closed"
    return found


def prose(page):
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def spans(page):
    """Inline code."""
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


# ---------------------------------------------------------------------------------------------------------------- blocks

CHECKED = {"python", "sh", "yaml", "cpp", "text", "bibtex"}  # cpp: in docs/adding-an-op.md, which test_adding_an_op.py builds


@each_page
def test_blocks_have_a_language_that_is_checked(page):
    for line, language, _ in blocks(page):
        assert language in CHECKED, f"{name(page)}:{line}: expected one of {CHECKED}, got {language!r}"
        assert language != "cpp" or page.name == "adding-an-op.md"


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "adding-an-op.md" and "```python" in p.read_text()], ids=name)
def test_python_blocks_run(page, tmp_path):
    """One after the other, as a reader would paste them. The README's with what a plain `pip install .` brings."""
    blocked = BESIDE_TRAINING if page.name == "README.md" else []
    code = [f"import sys; sys.modules.update(dict.fromkeys({blocked}))"] if blocked else []
    for line, language, text in blocks(page):
        if language == "python":
            code.append(f"exec(compile({text!r}, {f'{name(page)}, block of line {line}'!r}, 'exec'))")
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readme_cites_the_paper_of_the_citation_file():
    citation = (ROOT / "CITATION.cff").read_text()
    (bibtex,) = (text for _, language, text in blocks(FRONT[0]) if language == "bibtex")
    title, venue, year = (re.search(rf"{key}\s*=\s*{{(.*?)}}", bibtex)[1] for key in ("title", "booktitle", "year"))
    assert f'"{title}"' in citation and f'"{venue}"' in citation and f"year: {year}" in citation
    assert f"version: {PROJECT['version']}\n" in citation


# -------------------------------------------------------------------------------------------------------------- commands


def commands(text):
    """The commands of a shell block as lists of words, without assignments in front and comments behind."""
    for line in text.replace("\\\n", " ").split("\n"):
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0], re.DOTALL):
            words.pop(0)
        if words:
            yield words


def parse_stmae(argv, monkeypatch):
    """``stmae ARGV`` through the real command line, but for the running itself."""
    from stmae.training import cli

    ran = []
    for module, _ in cli.COMMANDS.values():
        module = importlib.import_module(f"stmae.training.commands.{module}")
        monkeypatch.setattr(module, "run", ran.append)
        monkeypatch.delattr(module, "exit_status", raising=False)  # of what was run
    try:
        assert cli.main(argv) == 0
        assert len(ran) == 1
    except SystemExit as error:
        assert error.code == 0 and "--help" in argv, f"stmae {shlex.join(argv)}"


def check_python(words, monkeypatch):
    if words[0] == "-m":
        module, rest = words[1], words[2:]
        if module == "stmae.training":
            parse_stmae(rest, monkeypatch)
        elif module == "pytest":
            check_pytest(rest)
        else:
            assert importlib.util.find_spec(module), f"python -m {module}"
    else:
        assert (ROOT / words[0]).is_file(), words


def check_pytest(words):
    paths = [word for word in words if word.startswith(("tests", "bench"))]
    assert paths and all((ROOT / path).exists() or path in MADE for path in paths), words
    known = (ROOT / "bench/conftest.py").read_text()
    ours = {word for word in words if word.startswith("--")} - {"--benchmark-only"}
    assert all(f'"{option}"' in known for option in ours), words


def check_pip(words):
    assert words[0] == "install"
    for word in words[1:]:
        if extras := re.fullmatch(r"\.\[(.*)\]", word):
            assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"]), word
        else:
            assert word in (".", "-e", "torch"), word


def check_command(words, monkeypatch):
    program, rest = Path(words[0]).name, words[1:]
    if program == "stmae":
        parse_stmae(rest, monkeypatch)
    elif program == "torchrun":
        check_python(rest[rest.index("-m") :], monkeypatch)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets = re.search(r"^\.PHONY: (.*)", makefile, re.MULTILINE)[1].split()
        for word in rest:
            variable = word.partition("=")[0] if "=" in word else None
            assert word in targets or (variable and re.search(rf"^{variable} \?=", makefile, re.MULTILINE)), word
    elif program == "python":
        check_python(rest, monkeypatch)
    elif program == "pytest":
        check_pytest(rest)
    elif program == "pip":
        check_pip(rest)
    elif program == "pre-commit":
        assert rest == ["install"]
    elif program == "ruff":
        assert rest[0] in ("check", "format")
    else:
        raise AssertionError(f"no check for the command {shlex.join(words)}")


@pytest.mark.parametrize("page", [p for p in PAGES if "```sh" in p.read_text()], ids=name)
def test_commands_parse(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _, language, text in blocks(page):
        if language == "yaml":
            (tmp_path / "run.yaml").write_text(text)
        if language == "sh":
            for words in commands(text):
                check_command(words, monkeypatch)


@pytest.fixture(scope="module")
def options():
    """Every option of every command, from its help."""
    from stmae.training import cli

    shown = io.StringIO()
    for command in cli.COMMANDS:
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            cli.main([*command.split(), "--help"])
    return set(re.findall(r"--[A-Za-z_][\w.]*", shown.getvalue()))


def test_options_and_commands_in_the_text_exist(options, monkeypatch):
    from stmae.training import cli

    settings = 0
    for page in PAGES:
        for span in spans(page):
            words = span.split()
            if span.startswith("--"):
                given = [word.partition("=")[0] for word in words if word.startswith("--")]
                development = {"--full", "--benchmark-only", "--update", "--case", "--device"}
                assert set(given) <= options | development, f"{name(page)}: {span}"
                settings += 1
            elif words[0] == "stmae" and len(words) > 1 and words[1] != "COMMAND":
                assert words[1] in cli.COMMANDS or " ".join(words[1:3]) in cli.COMMANDS, f"{name(page)}: {span}"
            elif words[0] in ("make", "pytest", "pip", ".venv/bin/pip", "python", ".venv/bin/python") and len(words) > 1:
                plain = shlex.split(span)
                if not {"NAME", "COMMAND"} & set(plain):
                    check_command(plain, monkeypatch)
    assert settings > 10  # they are found


# -------------------------------------------------------------------------------------------------- paths, links, variables


@each_page
def test_paths_exist(page):
    top = r"(?:stmae|csrc|kernels|training|tests|bench|studies|docs|examples|\.ci)"
    for span in spans(page):
        if re.fullmatch(rf"{top}(?:/[\w.*<>-]+)*/?", span) and "/" in span:
            pattern = span.replace("<op>", "*").rstrip("/")
            assert any(ROOT.glob(pattern)) or pattern in made(page), f"{name(page)}: there is no {span}"


def anchors(page):
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)}: there is no {target}"
        assert not anchor or anchor in anchors(file), f"{name(page)}: {path} has no heading {anchor}"


def test_every_page_can_be_reached():
    reached, queue = set(), [FRONT[0], ROOT / "examples/README.md", ROOT / "docs/index.md"]
    while queue:
        page = queue.pop()
        if page in reached:
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)\s#]+\.md)(?:#[^)]*)?\)", page.read_text())
        queue += [(page.parent / link).resolve() for link in links if not link.startswith("https://")]
    assert not set(PAGES) - reached


def test_every_environment_variable_is_documented():
    """Names in quotes are what Python and C++ ask the environment for."""
    used = set()
    for pattern in SOURCES:
        for file in ROOT.glob(pattern):
            text = file.read_text()
            used.update(re.findall(r"[\"'](STMAE_[A-Z0-9_]+)[\"']", text))
            if file.name == "Makefile":
                used.update(re.findall(r"\b(STMAE_[A-Z0-9_]+)\b", text))
    table = (ROOT / "docs/configuration.md").read_text()
    documented = set(re.findall(r"^\| `(STMAE_[A-Z0-9_]+)` \|", table, re.MULTILINE))
    assert "STMAE_CPU_CAPABILITY" in used and "STMAE_LINEAR" in used
    assert used == documented


def test_every_extra_is_documented():
    text = (ROOT / "docs/install.md").read_text()
    rows = " ".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE))
    assert set(re.findall(r"`([\w-]+)`", rows)) == set(PROJECT["optional-dependencies"])


def test_every_op_is_in_the_docs():
    from stmae import ops

    for page in ("docs/library.md", "docs/kernels/index.md"):
        assert set(ops.__all__) - {"set_linear_backend"} <= set(spans(ROOT / page)), page


@pytest.mark.parametrize("package", ["ops", "models", "checkpoint", "training"])
def test_the_api_pages_have_everything_public(package):
    """Each by its full name, or the whole package where no module has the name of one of its functions."""
    page = (ROOT / f"docs/api/{package}.md").read_text()
    shown = re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)
    names = set(importlib.import_module(f"stmae.{package}").__all__)
    if f"stmae.{package}" not in shown:
        assert names <= {entry.rpartition(".")[2] for entry in shown}
    for entry in shown:
        module, _, name = entry.rpartition(".")
        module = f"stmae.{module}" if module.startswith("training") else module
        assert hasattr(importlib.import_module(module), name), entry


def test_the_workflows_make_what_there_is(monkeypatch):
    import yaml

    commands_found = 0
    for file in sorted((ROOT / ".github/workflows").glob("*.yml")):
        for job in yaml.safe_load(file.read_text())["jobs"].values():
            for step in job["steps"]:
                words = shlex.split(step.get("run", ""), comments=True)
                if words[:1] == ["make"]:
                    check_command(words, monkeypatch)
                    commands_found += 1
    assert commands_found > 3


def test_the_front_pages_are_short():
    assert len(FRONT[0].read_bytes()) <= 5000
    assert len(FRONT[1].read_bytes()) <= 4000
