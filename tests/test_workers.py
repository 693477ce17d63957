"""Worker processes leave nothing behind."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The batches stay referenced to the end, as by device buffers and tracebacks.
SCRIPT = """
import time
from xsmae.configs import quickstart
from xsmae.data.catalogue import build_source
from xsmae.trainer import batches_of, create_sampler

if __name__ == "__main__":
    config = quickstart.get_config("method=mae")
    config.data.num_images, config.data.size = 30, 32
    config.views.size, config.batch_size, config.input.num_workers = 16, 8, 2
    source, sampler = build_source(config.data), create_sampler(config)
    batches = batches_of(config, source, sampler, 0, 6)
    kept = [next(batches) for _ in range({taken})]
    kept.append(kept)
    batches.close()
    time.sleep(1)  # like the last save of a run; a thread frees the segments
    print(sum(int(batch["image"].sum()) for batch in kept[:-1]))
"""


@pytest.mark.parametrize("taken", [2, 6])
def test_no_shared_memory_is_left(taken, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(taken=taken))
    done = subprocess.run(
        [sys.executable, script], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
    assert "leaked" not in done.stderr
    assert "resource_tracker" not in done.stderr
