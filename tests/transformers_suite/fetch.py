"""Fetch transformers' own common tests: they are in the sdist of each release, but not in the wheel.

    python tests/transformers_suite/fetch.py     # prints the folder they are in

Nothing of them enters this repository: they are kept under ~/.cache/modeling-yan, or $YAN_SUITE_CACHE.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path, PurePosixPath

PACKAGE = "transformers_common_tests"  # their `tests`, under a name that can't be mistaken for ours
REQUIRED = ("test_modeling_common.py", "test_configuration_common.py", "test_training_mixin.py")


class SuiteUnavailable(RuntimeError):
    """The tests are neither in the cache nor could they be fetched."""


def cache_root() -> Path:
    return Path(os.environ.get("YAN_SUITE_CACHE") or Path.home() / ".cache" / "modeling-yan")


def suite_folder() -> Path:
    """The folder that holds `PACKAGE` for the installed transformers, fetched now if it isn't there yet."""
    release = version("transformers")
    folder = cache_root() / f"transformers-{release}"
    if not all((folder / PACKAGE / name).is_file() for name in REQUIRED):
        _fetch(release, folder)
    return folder


def _fetch(release: str, folder: Path):
    """Download and unpack beside `folder`, then rename: whoever finds the folder finds it whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=folder.parent) as aside:
        whole = Path(aside) / "whole"
        _unpack_tests(_download_sdist(release, Path(aside)), whole / PACKAGE)
        missing = [name for name in REQUIRED if not (whole / PACKAGE / name).is_file()]
        if missing:
            raise SuiteUnavailable(f"the sdist of transformers {release} has no tests/{', tests/'.join(missing)}")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            whole.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise


def _download_sdist(release: str, destination: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers"]
    command += ["--dest", str(destination), f"transformers=={release}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    sdists = list(destination.glob("transformers-*.tar.gz"))
    if result.returncode or not sdists:
        reason = (result.stderr.strip() or result.stdout.strip()).splitlines()[-1:]
        raise SuiteUnavailable(
            f"transformers' own tests could not be fetched: they are in the sdist of transformers {release}, which "
            f"`pip download` did not get ({' '.join(reason)}). Connect to the network once, or set YAN_SUITE_CACHE to "
            "a folder that has them, or YAN_SUITE_OPTIONAL=1 to skip them."
        )
    return sdists[0]


def _unpack_tests(sdist: Path, package: Path):
    """Write the files of the sdist's `tests/` to `package`, which is made importable."""
    with tarfile.open(sdist) as archive:
        for member in archive:
            inside = PurePosixPath(member.name).parts[1:]
            if not member.isfile() or inside[:1] != ("tests",) or ".." in inside:
                continue
            target = package.joinpath(*inside[1:])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.extractfile(member).read())
    (package / "__init__.py").touch()


if __name__ == "__main__":
    print(suite_folder())
