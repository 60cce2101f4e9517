"""What a report finds in a run, and whether it is written as it was found."""

import json
from pathlib import Path

import numpy as np

from doremi_train.evaluation.detectors import Finding
from doremi_train.stages import report
from helpers.sessions import opened

KINDS = {
    "one_hot", "absent", "repeated", "mismatched", "noise", "trivial", "overfit", "duplicate",
    "seed_spread",
}  # fmt: skip


def diagnosed(*overrides: str) -> list[Finding]:
    with opened(*overrides) as session:
        return report.diagnose(session)


def well_formed(run_dir: Path, found: list[Finding]) -> None:
    written = json.loads((run_dir / "findings.json").read_text())
    assert [Finding(**{**entry, "domains": tuple(entry["domains"])}) for entry in written] == found
    for finding in found:
        assert finding.kind in KINDS and finding.message.endswith(".")
        assert type(finding.value) is float and np.isfinite(finding.value)
