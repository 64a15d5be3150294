"""The fuzz targets for a few seconds each, from another beginning at every run."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not published for this machine"),
]
SCRIPT = Path(__file__).with_name("fuzz") / "targets.py"
SECONDS = 5
# A process inherits the peak of its parent's memory as its own, and libFuzzer takes that for the target's.
SMALL_PARENT = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"


@pytest.mark.parametrize("target", ["answers", "templates", "safetensors", "gguf"])
def test_nothing_that_others_send_or_publish_breaks_what_reads_it(target: str, tmp_path: Path) -> None:
    """A find stays in the test's folder; libFuzzer's words name the seed and the input."""
    options = [f"-max_total_time={SECONDS}", "-timeout=20", "-rss_limit_mb=4096", f"-artifact_prefix={tmp_path}/"]
    command = [sys.executable, "-c", SMALL_PARENT, sys.executable, str(SCRIPT), target, *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "Done " in done.stderr, done.stderr[-2000:]
