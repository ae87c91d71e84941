"""The commands that errors and warnings advise: found in what was printed, and run as they are printed."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from gaudi_calib.cli.main import PROGRAM, main
from tests.support.paths import ROOT

# In backticks, or up to where the line ends or goes on with another way.
_ADVISED = re.compile(
    rf"`([^`\n]*\b{PROGRAM} [^`\n]*)`|((?:cd \S[^\n]*? && )?{PROGRAM} (?!-v )[a-z][^`\n]*?|mv \S[^\n]*?)(?:; or |$)",
    re.M,
)


_FLAG = re.compile(r"\bgive (-[^,;\n]+?)(?=, which|;|$)", re.M)


class Told(NamedTuple):
    """How a command ended: its exit code, what it printed on stderr, and on stdout."""

    code: int
    err: str
    out: str

    @property
    def error(self) -> str:
        """What it failed with, where, why and fix included, or nothing."""
        return self.err[self.err.find("Error: ") :] if "Error: " in self.err else ""


def find_advised(printed: str) -> list[str]:
    """Return the lines of shell that `printed` advises, in their order.

    >>> find_advised("  fix:   make it: gaudi-calib reshard 'a b' -t 2 && gaudi-calib detect; or serve with -t 1")
    ["gaudi-calib reshard 'a b' -t 2 && gaudi-calib detect"]
    >>> find_advised("copy it, or run `gaudi-calib relocate /a` there")
    ['gaudi-calib relocate /a']
    """
    return [found[1] or found[2] for found in _ADVISED.finditer(printed)]


def run_words(words: list[str], cwd: Path, capsys: pytest.CaptureFixture[str], **env: str) -> Told:
    """Run a command in `cwd`: this package's in this process, as the program would, others and scripts as processes."""
    capsys.readouterr()
    if words[0] == PROGRAM:
        with contextlib.chdir(cwd), mock.patch.dict(os.environ, env), mock.patch.object(sys, "argv", words):
            code = main(words[1:])
        printed = capsys.readouterr()
        return Told(code, printed.err, printed.out)
    done = subprocess.run(
        words, cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT), **env}
    )
    return Told(done.returncode, done.stderr, done.stdout)


def follow(line: str, cwd: Path, capsys: pytest.CaptureFixture[str], rounds: int = 3) -> None:
    """Run an advised line of shell; what it fails with is honest, and its advice is followed, too."""
    for command in re.split(r" && ", line):
        words = shlex.split(command)
        if words[0] == "cd":
            cwd = Path(words[1])
            continue
        told = run_words(words, cwd, capsys)
        assert told.code != 2, f"{command}\n{told.err}"
        if told.code:
            settle(words, cwd, capsys, rounds - 1)


def settle(
    words: list[str],
    cwd: Path,
    capsys: pytest.CaptureFixture[str],
    rounds: int = 3,
    env: Mapping[str, str] | None = None,
    way: int = 0,
) -> None:
    """Run a command until it succeeds, doing what each error advises, at most `rounds` times and never for the same.

    Args:
        way: which of several advised lines to follow in the first round.
    """
    last = ""
    for step in range(rounds + 1):
        told = run_words(words, cwd, capsys, **(env or {}))
        if told.code == 0:
            return
        assert told.error and "unexpected" not in told.err, told.err
        assert told.error != last, f"following the advice changed nothing: {told.err}"
        last, advised, flag = told.error, find_advised(told.err), _FLAG.search(told.err)
        assert step < rounds and (advised or flag), f"{shlex.join(words)}\n{told.err}"
        if advised:
            follow(advised[way if step == 0 else 0], cwd, capsys, rounds)
        elif flag:
            words = [*words, *shlex.split(flag[1])]
