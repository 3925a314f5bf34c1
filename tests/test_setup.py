"""What setup installs."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_what_is_required_is_written_out_with_hashes():
    """After a change of requirements.in, or a merge, the command at its head has been run."""
    wanted = re.findall(r"^[\w.-]+==[\w.]+|^[\w.-]+", (ROOT / "requirements.in").read_text(), re.MULTILINE)
    written = dict(
        re.findall(
            r"^([\w.-]+==\S+) [^\n]*\\\n(    --hash=sha256:)?", (ROOT / "requirements.txt").read_text(), re.MULTILINE
        )
    )
    assert all(written.values()) and not any(name.startswith("torch==") for name in written)
    for line in wanted:
        found = [name for name in written if name == line.lower() or name.startswith(f"{line.lower()}==")]
        assert found or line.startswith("torch=="), line
