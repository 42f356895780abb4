"""Commands as a user types them, called in this process or in one of their own."""

import inspect
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from fastcore.script import anno_parser

BIN = Path(sys.executable).parent


def call_here(command, capsys, **options):
    """Call a command in this process; its exit status and stderr."""
    try:
        command(**options)
    except SystemExit as end:
        return end.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


def call_typed(command, capsys, *arguments):
    """Run the script of a command in this process; its exit status, stdout and stderr."""
    script, status = str(BIN / command), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    return status, *capsys.readouterr()


def call(command, *arguments, cwd=None, **environment):
    """Run a command in a process; its exit status, stdout and stderr."""
    offline = {"HF_HUB_OFFLINE": "1", "MFT_SST2_DIR": ""} | environment
    done = subprocess.run(
        [BIN / command, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | offline,
    )
    return done.returncode, done.stdout, done.stderr


def check_help(command, said=None):
    """The help names the command, its purpose and every option with what it means."""
    parser = anno_parser(command, prog=command.__name__)
    said = said or parser.format_help()
    assert f"usage: {command.__name__}" in said
    flat = " ".join(said.split())
    assert " ".join(command.__doc__.split()) in flat
    for name, parameter in inspect.signature(command).parameters.items():
        shown = name if parameter.default is parameter.empty else f"--{name}"
        assert shown in said
    assert all(action.help for action in parser._actions), "an option without a word on it"


def check_refusal(status, said, expected):
    """Exit status 2, no traceback, one line, the expected words."""
    assert status == 2, said
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert ": error: " in last
    assert expected in last


def filled(options, files):
    """Options with the folder of the test's files put in."""
    return {k: v.format(files=files) if isinstance(v, str) else v for k, v in options.items()}
