"""Checks the licences of everything that latepage is built from, and advisories where a tool for that is installed.

Licences: every Rust crate in the lock file (``cargo metadata``), and every Python package needed at run time or for the
extra ``plot`` (their installed metadata). Advisories: cargo-deny, cargo-audit and pip-audit each need a database from the
network, so they run only where someone has installed them.
"""

import json
import re
import shutil
import subprocess
import sys
from importlib import metadata

# May stand in a product under Apache-2.0 without further duties than their notice.
ALLOWED = {
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "MIT-CMU",
    "PSF-2.0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
    # LLVM's exception only takes duties away.
    "LLVM-exception",
}

# Licences that a package's metadata does not give as an SPDX expression, read by hand.
READ_BY_HAND: dict[str, str] = {}

# Used beside latepage and unchanged, which their licence allows without any duty for who only uses them.
UNCHANGED = {"certifi": "MPL-2.0"}  # a list of certificates, which httpx brings

FREE_TEXT = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Python Software Foundation License": "PSF-2.0",
    "Historical Permission Notice and Disclaimer (HPND)": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}


def allowed(expression: str) -> bool:
    """Whether an SPDX expression can be met with ALLOWED alone.

    >>> allowed("MIT OR GPL-3.0"), allowed("MIT AND GPL-3.0"), allowed("(MIT OR Apache-2.0) AND Unicode-3.0")
    (True, False, True)
    """
    # Older crates write "MIT/Apache-2.0" for OR; an exception is joined by WITH.
    words = re.findall(r"[()]|[\w.+-]+", expression.replace("/", " OR "))
    python = {"OR": "or", "AND": "and", "WITH": "and", "(": "(", ")": ")"}
    terms = [python.get(word, str(word in ALLOWED)) for word in words]
    # What is evaluated consists of True, False, and, or and parentheses only.
    return bool(terms) and bool(eval(" ".join(terms), {"__builtins__": {}}))  # noqa: S307


def crates() -> dict[str, str]:
    """Name and licence of every third-party crate in the resolved graph, tests' and builds' included."""
    out = subprocess.run(["cargo", "metadata", "--format-version=1", "--locked"], check=True, capture_output=True)
    packages = json.loads(out.stdout)["packages"]
    return {f"{p['name']} {p['version']}": p["license"] or "?" for p in packages if p["source"]}


def distributions() -> dict[str, str]:
    """Name and licence of every Python package that a user of latepage installs with it."""
    found: dict[str, str] = {}
    waiting = ["latepage"]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # for another platform or Python
        key = f"{name} {package.version}"
        if key in found:
            continue
        found[key] = READ_BY_HAND.get(name) or licence_of(package)
        waiting += [
            re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
            for requirement in package.requires or []
            # Of latepage's own extras all count; of others', those that nobody asked for do not.
            if "extra ==" not in requirement or name == "latepage"
        ]
    return found


def licence_of(package: metadata.Distribution) -> str:
    """The SPDX expression of a package, from whichever of three fields it was put into."""
    about = package.metadata
    if "License-Expression" in about:
        return about["License-Expression"]
    classifiers = [str(c) for c in about.get_all("Classifier", []) if str(c).startswith("License ::")]
    known = [FREE_TEXT[c.rpartition(" :: ")[2]] for c in classifiers if c.rpartition(" :: ")[2] in FREE_TEXT]
    return " AND ".join(known) or (about["License"] if "License" in about else "?").splitlines()[0]  # noqa: SIM401 (it has no get)


def advisories() -> bool:
    """Runs what is installed of the advisory checkers; says what was skipped. True when all is well."""
    well = True
    checks = {
        "cargo-deny": ["cargo", "deny", "check", "advisories"],
        "cargo-audit": ["cargo", "audit"],
        "pip-audit": ["pip-audit", "--require-hashes", "--requirement", "requirements.lock"],
    }
    for tool, command in checks.items():
        if shutil.which(tool) is None:
            print(f"advisories: {tool} is not installed: skipped")
        else:
            well &= subprocess.run(command, check=False).returncode == 0
    return well


def main() -> int:
    everything = crates() | distributions()
    refused = {
        name: licence
        for name, licence in everything.items()
        if not allowed(licence) and UNCHANGED.get(name.split()[0]) != licence
    }
    for name, licence in sorted(refused.items()):
        print(f"licence of {name}: {licence}: not among those that tools/licences.py allows")
    print(f"licences: {len(everything) - len(refused)} of {len(everything)} packages are fine")
    return 1 if refused or not advisories() else 0


if __name__ == "__main__":
    sys.exit(main())
