"""The command line: every command explains itself, and errors are one line and an exit code."""

import pytest

from coneslab import cli

COMMANDS = ("pretrain", "evaluate-model", "experiment", "compare", "build-stickers")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert command in capsys.readouterr().out


def test_all_commands_are_listed(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


def test_errors_are_told_in_one_line_without_a_traceback(tmp_path, capsys):
    assert cli.main(["build-stickers", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert told.startswith("coneslab: ") and "@lobehub/fluent-emoji-3d" in told and "Traceback" not in told


def test_settings_that_are_no_json_are_told(capsys):
    assert cli.main(["compare", "--settings", "steps=50"]) == 1
    assert "steps=50" in capsys.readouterr().err
