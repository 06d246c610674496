"""The checks of `.ci/check`, each in an environment of its own: `nox`, `nox -s lint types`, `nox -s slow`."""

import nox

PINNED = ("--constraint", ".ci/constraints.txt")
nox.options.sessions = ["lint", "types", "docs", "tests"]
nox.options.reuse_existing_virtualenvs = True


def check(session: nox.Session) -> None:
    session.run(".ci/check", session.name, external=True)


def check_all(session: nox.Session) -> None:
    session.install(*PINNED, "torch==2.13.0")
    session.install(*PINNED, "-e", ".[dev,examples,demo]")
    check(session)


for name in ("types", "tests", "slow"):
    nox.session(check_all, name=name)


@nox.session
def lint(session: nox.Session) -> None:
    session.install(*PINNED, "ruff", "bandit")
    check(session)


@nox.session
def docs(session: nox.Session) -> None:
    requirements = session.run("python", ".ci/requirements.py", "docs", silent=True)
    session.install(*str(requirements).split())
    check(session)
