"""Log lines and the display of phases: on a terminal, elsewhere, and in a file."""

import errno
import io
import logging as stdlib_logging
import re
import sys
import threading
import warnings
from unittest import mock

import pytest
from absl import logging

from mtl_sparse.runtime import compile_cache, logs, processes, progress
from mtl_sparse.runtime.errors import Stopped, UserError


def info(message):
    """Log a line of this project: INFO lines of other code, such as this file, are left out."""
    if logging.get_absl_logger().isEnabledFor(stdlib_logging.INFO):
        logging.get_absl_logger().handle(
            stdlib_logging.LogRecord("absl", stdlib_logging.INFO, logs.__file__, 1, message, (), None)
        )


LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)")


class Tty(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def shown(monkeypatch):
    """Return a function that calls `logs.show` with another stderr, a terminal or not, and returns it."""
    root, level = stdlib_logging.getLogger(), stdlib_logging.getLogger().level
    handlers, absl_level = root.handlers[:], logging.get_absl_logger().level

    def show(is_terminal, **environment):
        for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30", **environment}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "stderr", Tty() if is_terminal else io.StringIO())
        logs.show()
        return sys.stderr

    yield show
    progress.set_display(None)
    logs._handlers.clear()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.get_absl_logger().setLevel(absl_level)
    stdlib_logging.captureWarnings(False)


@pytest.mark.parametrize(("is_terminal", "term"), [(False, "xterm-256color"), (True, "dumb")])
def test_without_a_terminal_there_are_plain_lines(shown, is_terminal, term):
    err = shown(is_terminal, TERM=term, FORCE_COLOR="1")
    with progress.phase("training", 10, "step") as phase:
        phase.update(3)
        info("a [bold]line[/bold]")
        logging.warning("careful")
        phase.log()
    lines = err.getvalue().splitlines()
    assert [LINE.fullmatch(line)[1] for line in lines] == [
        "a [bold]line[/bold]",
        "WARNING: careful",
        "3/10 steps",
    ], "times and messages, and no control codes"


def test_a_terminal_shows_the_phases_below_the_lines(shown):
    err = shown(True)
    with progress.phase("training", 10, "step") as phase:
        phase.update(3)
        phase.set_row("losses", "depth 0.25")
        with progress.phase("evaluating"):
            info("a [bold]line[/bold]")
            phase.log()
            assert err.getvalue().count("\x1b[?25l") == 1 and "\x1b[?25h" not in err.getvalue(), "one display"
    out = err.getvalue()
    assert "3/10 steps" in out and "depth 0.25" in out and "evaluating" in out
    times = re.findall(r"\d\d:\d\d:\d\d (.*?) *\r?\n", re.sub(r"\x1b\[[\d;]*m", "", out))
    assert times == ["a [bold]line[/bold]"], "what the display shows is not a line as well"
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l"), "the cursor is visible again"
    before = len(out)
    info("after")
    assert "evaluating" not in err.getvalue()[before:]


def test_the_display_ends_with_an_error(shown):
    err = shown(True)
    with pytest.raises(KeyError), progress.phase("training"):
        raise KeyError
    out = err.getvalue()
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l") and sys.stderr is err
    assert not [thread for thread in threading.enumerate() if "Refresh" in type(thread).__name__ and thread.is_alive()
                and not thread.done.is_set()]  # fmt: skip


def test_a_terminal_that_is_closed_ends_no_run(shown, monkeypatch, tmp_path):
    """As in a shell that is left with `disown`: each write fails from then on."""
    err = shown(True)
    stdout = sys.stdout
    with logs.to_file(tmp_path / "log.txt"), progress.phase("training", 10):
        monkeypatch.setattr(err, "write", mock.Mock(side_effect=OSError(errno.EIO, "Input/output error")))
        with progress.phase("evaluating"):
            logging.warning("a line")
        assert sys.stderr is err and sys.stdout is stdout, "what is printed does not pass the display any more"
        tried = err.write.call_count
        logging.warning("another")
    with progress.phase("drawing"):
        pass
    assert err.write.call_count == tried, "nothing is tried again"
    assert "a line" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("closed", ["stderr", "stdout"])
def test_a_closed_stream_ends_no_run(shown, monkeypatch, tmp_path, closed):
    """Python has None for a stream that is closed, as by `2>&-`."""
    shown(True)
    monkeypatch.setattr(sys, closed, None)
    logs.show()
    with logs.to_file(tmp_path / "log.txt"), progress.phase("training", 10):
        logging.warning("a line")
    assert "a line" in (tmp_path / "log.txt").read_text()


YELLOW, RED = "\x1b[1;33m", "\x1b[1;31m"


def test_warnings_and_errors_stand_out(shown):
    err = shown(True)
    info("calm")
    assert YELLOW not in err.getvalue()
    warnings.warn("old function", FutureWarning, stacklevel=1)
    assert YELLOW in err.getvalue() and "FutureWarning: old function" in err.getvalue()
    assert RED not in err.getvalue()
    logging.error("broken")
    assert RED in err.getvalue()


def test_no_color_is_respected(shown):
    err = shown(True, NO_COLOR="1")
    with progress.phase("training", 10) as phase:
        phase.update(3)
        logging.warning("careful")
    codes = {code for group in re.findall(r"\x1b\[([\d;]*)m", err.getvalue()) for code in group.split(";")}
    assert "WARNING: careful" in err.getvalue() and "3/10" in err.getvalue()
    assert codes <= {"", "0", "1", "2"}, "bold and dim are no colors"


def test_output_of_other_code_is_printed_above_the_display(shown, monkeypatch):
    err = shown(True)
    monkeypatch.setattr(sys, "stdout", Tty())
    with progress.phase("training"):
        print("a table")
        assert "a table" in err.getvalue()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with progress.phase("training"):
        print("another")
    assert sys.stdout.getvalue() == "another\n", "a file gets what is printed, without the display"
    assert "another" not in err.getvalue()


def test_other_libraries_are_quiet_unless_they_warn(shown):
    err = shown(False)
    logger = logging.get_absl_logger()
    for level, message in ((20, "a file"), (30, "too old"), (40, "raised, too")):
        logger.handle(logger.makeRecord("absl", level, "/x/orbax/a/b.py", 1, message, (), None))
    assert [LINE.fullmatch(line)[1] for line in err.getvalue().splitlines()] == ["WARNING: too old"]


def test_lines_are_shown_once_where_logging_was_set_up_before(shown, tmp_path):
    """In a notebook, Orbax calls `logging.basicConfig` when it is imported, before `logs.show`."""
    err = shown(False)
    root, own = stdlib_logging.getLogger(), stdlib_logging.FileHandler(tmp_path / "own.txt")
    root.handlers[:] = [stdlib_logging.StreamHandler(), own]  # as basicConfig makes it
    logs.show()
    info("once")
    own.close()
    assert err.getvalue().count("once") == 1 and LINE.fullmatch(err.getvalue().strip())
    assert (tmp_path / "own.txt").read_text() == "once\n", "a handler of the user's own stays"


def test_a_file_gets_the_lines_since_the_start_and_the_error(shown, tmp_path):
    err = shown(True)
    path = tmp_path / "log.txt"
    info("before")
    with pytest.raises(ZeroDivisionError), logs.to_file(path), progress.phase("training", 10, "step") as phase:
        logging.warning("within")
        phase.log()
        1 / 0  # noqa: B018
    info("after")
    text = path.read_text()
    lines = [LINE.fullmatch(line)[1] for line in text.splitlines() if LINE.match(line)]
    assert lines == ["before", "WARNING: within", "0/10 steps", "ERROR: division by zero"]
    assert "Traceback" in text and "ZeroDivisionError" in text and "\x1b" not in text
    assert "Traceback" not in err.getvalue(), "Python prints it at the end"
    with pytest.raises(UserError), logs.to_file(path):
        raise UserError("FILE_MISSING", "no file")
    with pytest.raises(Stopped), logs.to_file(path):
        raise Stopped("stopped at step 3")
    added = path.read_text().removeprefix(text)
    assert [LINE.fullmatch(line)[1] for line in added.splitlines()] == [
        "after",
        "ERROR: no file [FILE_MISSING]",
        "WARNING: stopped at step 3",
    ], "appended, without tracebacks"


def test_a_full_disk_ends_no_run_that_logs(shown, tmp_path):
    shown(False)
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with logs.to_file(tmp_path / "log.txt"):
        logging.warning("a line")
        logging.warning("another")


def test_a_line_with_wrong_arguments_ends_no_run(shown, tmp_path):
    """A library's mistake: the standard library prints it, too, and continues."""
    err = shown(False)
    with logs.to_file(tmp_path / "log.txt"):
        for handler in logs._handlers:  # pytest's own raises it
            handler.handle(stdlib_logging.LogRecord("x", stdlib_logging.WARNING, "x.py", 1, "%d files", ("no",), None))
        logging.warning("next")
    assert err.getvalue().count("Logging error") == 2 and "next" in (tmp_path / "log.txt").read_text()


def test_the_output_of_a_sweeps_run_is_not_written_twice(shown, tmp_path, monkeypatch):
    shown(False)
    path = tmp_path / "log.txt"
    with path.open("a") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        logs.show()
        with logs.to_file(path):
            info("once")
    assert path.read_text().count("once") == 1


def test_without_show_no_file_is_written(tmp_path):
    with logs.to_file(tmp_path / "log.txt"):
        logging.warning("a line")
    assert not list(tmp_path.iterdir())


def test_other_processes_only_warn(shown, monkeypatch):
    err = shown(True)
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *_: None)
    monkeypatch.setattr(processes, "is_first", lambda: False)
    processes.join("here:1", 2, 1)
    with progress.phase("training", 10):
        info("progress")
        assert err.getvalue() == ""
        logging.warning("careful")
    assert "careful" in err.getvalue() and "training" not in err.getvalue()


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_rate_is_of_the_last_updates_and_begins_with_the_first(clock):
    phase = progress.Phase("training", 1000, "step")
    assert phase.numbers == "0/1000 steps"
    clock[0] = 100.0  # compiling
    phase.update(1)
    assert phase.rate == "", "nothing is known yet"
    for step in range(2, 102):
        clock[0] += 1.0
        phase.update(step)
    assert phase.numbers == "101/1000 steps, 1.0 s a step, 15 min left"
    for step in range(102, 302):
        clock[0] += 0.5
        phase.update(step)
    assert phase.numbers == "301/1000 steps, 2.0 steps/s, 8 min left", "the time left follows the mean of the run"


def test_the_rate_of_slow_units_is_of_ten_updates(clock):
    phase = progress.Phase("sweep", 20, "run")
    phase.update(0)
    for run in range(1, 15):
        clock[0] += 50 if run % 2 else 70
        phase.update(run)
    assert phase.rate == "60.0 s a run"


def test_tracked_items_are_counted(monkeypatch):
    seen = []
    display = mock.Mock(begin=seen.append, end=lambda phase: seen.append(phase.done))
    monkeypatch.setattr(progress, "_displays", [display])
    assert list(progress.track(range(3), "rendering")) == [0, 1, 2]
    assert seen[0].total == 3 and seen[1] == 3


def test_a_first_call_logs_whether_it_compiled(tmp_path, caplog, monkeypatch):
    import jax

    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    try:
        with caplog.at_level("INFO", logger="absl"):
            for expected in ("The sum was compiled in", "The sum was loaded from the cache in"):
                jax.clear_caches()
                function = compile_cache.announced(jax.jit(lambda x: x + 1), "sum")
                caplog.clear()
                assert [int(function(1)), int(function(2))] == [2, 3]
                assert [record.getMessage().startswith(expected) for record in caplog.records] == [True], caplog.text
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        jax.experimental.compilation_cache.compilation_cache.reset_cache()
