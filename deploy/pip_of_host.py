"""Copies this machine's pip configuration for a build in containers: `pip_of_host.py FOLDER`.

Deliberately knows nothing of containers: it writes FOLDER/pip.conf, and FOLDER/ca.crt if there is a bundle of its own,
and prints the other folders that the configuration names, one per line, for the caller to mount where they are.
"""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

MOUNTED_AT = "/mnt/pip"
"""Where the caller mounts FOLDER."""

_PATH_OPTIONS = ("extra-index-url", "find-links", "index-url")
_OTHER_OPTIONS = ("default-timeout", "no-index", "proxy", "timeout", "trusted-host")


def read_configuration() -> dict[str, str]:
    """Options by name; the environment wins over files, as in pip."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    entries = [line.partition("=") for line in listed]
    values = {key: str(ast.literal_eval(value)) for key, _, value in entries}
    by_rank = sorted(values, key=lambda key: key.startswith(":env:"))
    return {key.removeprefix(":env:").rpartition(".")[2]: values[key] for key in by_rank}


def folders_in(value: str) -> set[Path]:
    """Folders of this machine that an option names. A `simple` index links to files beside it, so its parent."""
    paths = (Path(word.removeprefix("file://")) for word in value.split())
    existing = {path for path in paths if path.is_absolute() and path.exists()}
    return {path.parent if path.name == "simple" or path.is_file() else path for path in existing}


def main() -> None:
    """Writes the files and prints the folders."""
    target = Path(sys.argv[1])
    configuration = read_configuration()
    kept = {name: configuration[name] for name in (*_PATH_OPTIONS, *_OTHER_OPTIONS) if name in configuration}
    folders = {folder for name in _PATH_OPTIONS for folder in folders_in(kept.get(name, ""))}
    if "cert" in configuration:
        shutil.copyfile(configuration["cert"], target / "ca.crt")
        kept["cert"] = f"{MOUNTED_AT}/ca.crt"
    lines = [f"{name} = {value}" for name, value in kept.items()]
    (target / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
    sys.stdout.write("".join(f"{folder}\n" for folder in sorted(folders)))


if __name__ == "__main__":
    main()
