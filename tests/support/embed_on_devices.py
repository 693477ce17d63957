"""Embeds a scene on all devices: SCENE ENCODER OUT BATCH_SIZE."""

import json
import sys

import jax

from xsmae import cli


def main():
    scene, encoder, out, batch = sys.argv[2:]
    words = [scene, f"--encoder={encoder}", f"--out={out}", f"--batch_size={batch}"]
    status = cli.main(["xsmae", "embed", *words, "--chip_size=16", "--stride=9"])
    print(json.dumps({"devices": jax.device_count(), "status": status}))


if __name__ == "__main__":
    main()
