"""Packages as text: fetched at pinned versions, read, encoded, split into training and held-out packages."""

import argparse
import email.message
import hashlib
import itertools
import logging
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from transformers import PreTrainedTokenizerFast

from beacon.evaluation import is_held_out, read_documents
from prompts import WORDS
from tokenizer import load_or_train

logger = logging.getLogger(__name__)
PACKAGES = Path(__file__).with_name("packages.toml")
SUFFIXES = {".py", ".rst", ".md"}
PACKAGE_CHARACTERS = 4_000_000  # of one package at most: whole folders, chosen by a hash of their names
NAME_COUNT = 5000  # of every needle's name in the tokenizer's text
FILE_BYTES, LINE_CHARACTERS, LEAST_CHARACTERS = 400_000, 400, 500  # larger files and longer lines are generated tables


@dataclass(frozen=True)
class Package:
    """A package and its text.

    Args:
        name: Its name.
        version: Its version.
        licence: Its licence.
        held_out: Whether it is kept from training.
        files: Text by path.
    """

    name: str
    version: str
    licence: str
    held_out: bool
    files: dict[str, str]

    @property
    def text(self) -> str:
        """All files in the order of their paths, each under a line with its path."""
        return "\n".join(f"# file: {path}\n{text.strip()}\n" for path, text in sorted(self.files.items()))


class Corpus:
    """Encoded packages of one split: one stream of tokens and the borders of the packages in it.

    Args:
        tokens: uint16 ``[length]``; each package begins and ends with the end-of-text token.
        starts: int64 ``[packages + 1]``; package i is ``tokens[starts[i] : starts[i + 1]]``.
        names: Names of the packages.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, names: list[str]) -> None:
        self.tokens, self.starts, self.names = tokens, starts, names

    def document(self, index: int) -> np.ndarray:
        """Tokens of one package, uint16 ``[length]``."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    def __len__(self) -> int:
        return len(self.names)


def load_corpus(work: Path, only_stdlib: bool = False) -> tuple[PreTrainedTokenizerFast, Corpus, Corpus]:
    """Tokenizer and both splits, from the cache in ``work`` or made anew.

    Args:
        work: Folder of build products.
        only_stdlib: Read the standard library alone, for a trial without a package index.

    Returns:
        The tokenizer, the training split and the held-out split.
    """
    data = work / "data"
    if not (data / "packages.tsv").exists():
        data.mkdir(parents=True, exist_ok=True)
        packages = read_packages(work / "wheels", only_stdlib)
        names = " ".join(WORDS * NAME_COUNT)  # so that a needle's name is one token
        texts = itertools.chain([names], (p.text for p in packages if not p.held_out))
        tokenizer = load_or_train(work / "tokenizer", texts)
        for split, wanted in (("train", False), ("held_out", True)):
            _encode(tokenizer, [p for p in packages if p.held_out == wanted], data / split)
        rows = (f"{p.name}\t{p.version}\t{p.licence}\t{'held-out' if p.held_out else 'train'}" for p in packages)
        (data / "packages.tsv").write_text("\n".join(rows) + "\n")
    tokenizer = load_or_train(work / "tokenizer", iter(()))
    rows = [row.split("\t") for row in (data / "packages.tsv").read_text().splitlines()]
    splits = [
        Corpus(
            np.load(data / split / "tokens.npy", mmap_mode="r"),
            np.load(data / split / "starts.npy"),
            [row[0] for row in rows if (row[3] == "held-out") == (split == "held_out")],
        )
        for split in ("train", "held_out")
    ]
    return tokenizer, *splits


def read_packages(wheels: Path, only_stdlib: bool = False) -> list[Package]:
    """Read every package of ``packages.toml``; wheels that are not in the folder are fetched first."""
    listed = tomllib.loads(PACKAGES.read_text())
    packages = _read_stdlib(listed["stdlib"])
    for split in () if only_stdlib else ("train", "held-out"):
        for name, entry in listed[split].items():
            files = _read_wheel(_fetch(name, entry["version"], wheels))
            packages.append(Package(name, entry["version"], entry["licence"], split == "held-out", _within(files)))
    return packages


def _fetch(name: str, version: str, wheels: Path) -> Path:
    wheels.mkdir(parents=True, exist_ok=True)
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    found = [path for path in wheels.iterdir() if PurePosixPath(path.name.lower()).match(pattern)]
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--python-version", "3.11", "--dest", wheels, f"{name}=={version}"]
        if subprocess.run(list(map(str, command))).returncode:
            raise RuntimeError(
                f"pip could not fetch {name}=={version}; see its message above, or put the wheel into {wheels}."
            )
        found = [path for path in wheels.iterdir() if PurePosixPath(path.name.lower()).match(pattern)]
    return found[0]


def _read_wheel(wheel: Path) -> dict[str, str]:
    files = {}
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            path = PurePosixPath(entry.filename)
            if path.name == "METADATA":  # holds the package's description, mostly its README
                text = email.message_from_bytes(archive.read(entry)).get_payload()
                files[f"{path.parent.name.split('-')[0]}/README"] = str(text)
            elif path.suffix in SUFFIXES and entry.file_size <= FILE_BYTES:
                files[entry.filename] = archive.read(entry).decode("utf-8", errors="replace")
    return files


def _read_stdlib(entry: dict) -> list[Package]:
    """The standard library as packages: one of all single modules, and one of each folder."""
    groups: dict[str, dict[str, str]] = {}
    for path, text in read_documents().items():
        groups.setdefault(path.split("/")[0] if "/" in path else "stdlib", {})[path] = text
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return [
        Package(name, version, entry["licence"], is_held_out(f"{name}/"), _within(files))
        for name, files in sorted(groups.items())
    ]


def _within(files: dict[str, str]) -> dict[str, str]:
    """Usable files of whole folders, up to the limit of a package."""
    texts = {path: text.replace("\r\n", "\n") for path, text in files.items()}
    usable = {
        path: text
        for path, text in texts.items()
        if len(text) >= LEAST_CHARACTERS and "\ufffd" not in text and max(map(len, text.split("\n"))) <= LINE_CHARACTERS
    }
    folders: dict[str, list[str]] = {}
    for path in usable:
        folders.setdefault(str(PurePosixPath(path).parent), []).append(path)
    kept: dict[str, str] = {}
    room = PACKAGE_CHARACTERS
    for folder in sorted(folders, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        size = sum(len(usable[path]) for path in folders[folder])
        if size <= room:
            kept |= {path: usable[path] for path in folders[folder]}
            room -= size
    return kept


def _encode(tokenizer: PreTrainedTokenizerFast, packages: Iterable[Package], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    arrays = []
    for package in packages:
        ids = tokenizer(package.text, add_special_tokens=False, verbose=False)["input_ids"]
        arrays.append(np.array([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], np.uint16))
    np.save(folder / "tokens.npy", np.concatenate(arrays))
    np.save(folder / "starts.npy", np.cumsum([0, *map(len, arrays)]))


def main() -> None:
    """Read the command line, make the corpus and print what is in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/reproduce_100x"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    _, train, held_out = load_corpus(args.work)
    for split, corpus in (("train", train), ("held-out", held_out)):
        logger.info("%s: %.1fM tokens in %d packages", split, len(corpus.tokens) / 1e6, len(corpus))


if __name__ == "__main__":
    main()
