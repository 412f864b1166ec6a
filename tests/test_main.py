import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from pipeline.__main__ import COMMANDS, RUNNERS, main

ROOT = Path(__file__).parent.parent


@pytest.fixture
def command(monkeypatch):
    """Puts a command of the test's in the place of `inspect`; it has one option and does what `act` says."""

    def replace(act):
        module = ModuleType("pipeline.inspect", "Says what a snapshot holds.")
        module.add_arguments = lambda parser: parser.add_argument("--top", type=int, default=10)
        module.run = act
        monkeypatch.setitem(sys.modules, "pipeline.inspect", module)

    return replace


@pytest.fixture
def embedded(monkeypatch):
    """The arguments that `embed` was called with."""
    calls = []
    modules = ModuleType("pipeline.options"), ModuleType("pipeline.embed")
    modules[0].parse = tuple
    modules[1].embed = lambda options: calls.append(list(options)) or 3
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def raising(error):
    def act(arguments):
        raise error

    return act


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there(name):
    module = import_module(f"pipeline.{name}")
    for function in ("embed",) if name == "embed" else ("add_arguments", "run"):
        assert callable(getattr(module, function))


def test_help_names_every_word_and_loads_nothing_heavy():
    script = (
        "import sys; from pipeline.__main__ import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'torch', 'apache_beam', 'pyarrow', 'numpy'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    first_words = [line.split()[0] for line in result.stdout.splitlines() if line.strip()]
    assert set(COMMANDS) | set(RUNNERS) <= set(first_words)


@pytest.mark.parametrize(("options", "status"), [(["--help"], 0), (["--ouptut=x"], 2)])
def test_help_and_mistakes_of_embed_are_answered_without_loading_the_model(options, status):
    script = (
        "import sys; from pipeline.__main__ import main\n"
        f"try: main(['embed', *{options}])\n"
        "finally: assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, "Traceback" in result.stderr) == (status, False)


@pytest.mark.parametrize("argv", [[], ["frob"], ["--top", "3"], ["inspct", "--help"]])
def test_an_unknown_word_is_wrong_usage(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "usage: python -m pipeline" in error
    if argv and not argv[0].startswith("-"):
        assert all(repr(word) in error for word in (*COMMANDS, *RUNNERS))


def test_a_command_gets_its_options_and_gives_its_status(command):
    command(lambda arguments: arguments.top)
    assert main(["inspect", "--top", "7"]) == 7
    assert main(["inspect"]) == 10


@pytest.mark.parametrize("options", [["--to", "3"], ["--topp", "3"], ["--top", "three"], ["more"]])
def test_a_mistyped_option_is_wrong_usage(command, options, capsys):
    command(lambda arguments: 0)
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", *options])
    assert stopped.value.code == 2
    assert "usage: python -m pipeline inspect" in capsys.readouterr().err


def test_help_of_a_command_says_what_it_does(command, capsys):
    command(lambda arguments: 0)
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", "--help"])
    assert stopped.value.code == 0
    assert "Says what a snapshot holds." in capsys.readouterr().out


def test_embed_gets_its_options_untouched(embedded):
    options = ["--help", "--input=a b", "--no_such", "--", "-x"]
    assert main(["embed", *options]) == 3
    assert embedded == [options]


@pytest.mark.parametrize(
    ("word", "runner"), [("local", "FnApiRunner"), ("prism", "prism"), ("flink", "flink"), ("dataflow", "dataflow")]
)
def test_a_runners_word_is_embed_on_that_runner(embedded, word, runner):
    main([word, "--output", "o"])
    assert embedded == [[f"--runner={runner}", "--output", "o"]]


@pytest.mark.parametrize("error", [ValueError("no field 'x'"), FileNotFoundError("no file 'y'")])
def test_an_error_of_the_user_is_a_message(command, error, capsys):
    command(raising(error))
    assert main(["inspect"]) == 1
    assert capsys.readouterr() == ("", f"error: {error}\n")


def test_an_error_of_this_project_is_a_message(command, capsys):
    job_error = type("JobError", (Exception,), {"__module__": "pipeline.embed"})
    command(raising(job_error("the job failed")))
    assert main(["inspect"]) == 1
    assert capsys.readouterr().err == "error: the job failed\n"


def test_a_bug_shows_where_it_happened(command):
    command(raising(KeyError("bug")))
    with pytest.raises(KeyError):
        main(["inspect"])


def test_traceback_shows_where_any_error_happened(command):
    command(raising(ValueError("no field 'x'")))
    with pytest.raises(ValueError, match="no field 'x'"):
        main(["--traceback", "inspect"])


def test_an_interrupt_is_no_traceback(command, capsys):
    command(raising(KeyboardInterrupt()))
    assert main(["inspect"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    script = (
        "import sys; from types import ModuleType; from pipeline.__main__ import main\n"
        "module = sys.modules['pipeline.inspect'] = ModuleType('pipeline.inspect')\n"
        "module.add_arguments = lambda parser: None\n"
        "module.run = lambda arguments: [print('line') for _ in range(100_000)] and 0\n"
        "sys.exit(main(['inspect']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 1


@pytest.mark.parametrize("status", [0, 1, 130])
def test_a_process_ends_with_the_status_of_its_command_after_all_else_was_cleaned_up(status):
    script = (
        "import atexit, pipeline.__main__ as m\n"
        f"m.main = lambda: atexit.register(print, 'cleaned up', end='') and {status}\n"
        "m.run_and_leave()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (status, "cleaned up", "")
