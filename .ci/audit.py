"""Looks for known vulnerabilities of the packages in this environment, with pip-audit.

    .venv/bin/python .ci/audit.py

Exits with status 1 if a package has a vulnerability that a later version of the package fixes. If the database of
vulnerabilities cannot be reached, the program says so and exits with status 0.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

COMMAND = (sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off")
PROBE = "h11"  # a package of ours that is on PyPI: what the database says of it shows whether it can be reached
TIMEOUT_SECONDS = 300


def audit(*arguments: str) -> list[dict[str, object]] | None:
    """Returns what pip-audit found for each package, or None if it got no data."""
    try:
        result = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        return json.loads(result.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        return None


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{PROBE}=={metadata.version(PROBE)}\n")
        probed = audit("--requirement", str(requirements), "--no-deps", "--disable-pip")
    if not probed or "skip_reason" in probed[0]:
        print("   not run: the database of vulnerabilities cannot be reached")
        return
    packages = audit("--local", "--skip-editable")
    if packages is None:
        print("   not run: the database of vulnerabilities did not answer")
        return
    found = [(p["name"], p["version"], v) for p in packages for v in p.get("vulns", ())]  # type: ignore[attr-defined]
    for name, version, vulnerability in found:
        fixes = ", ".join(vulnerability["fix_versions"]) or "no version"
        print(f"   {name} {version}: {vulnerability['id']}, fixed in {fixes}")
    if any(vulnerability["fix_versions"] for _, _, vulnerability in found):
        sys.exit(1)
    print(f"   {len(packages)} packages, {len(found)} vulnerabilities without a fix")


if __name__ == "__main__":
    main()
