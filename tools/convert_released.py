"""Convert one of the paper author's checkpoints into a folder that `create_model(name, weights=FOLDER)` loads.

    python tools/convert_released.py released.pth outdir/

writes outdir/model.safetensors, outdir/config.json and outdir/README.md. The variant is recognised from the file, the
anchors are taken from it, and nothing in it is executed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from ctmasknet import CTMaskNetError, load_released
from ctmasknet.errors import ConfigError
from ctmasknet.weights.files import write_weights
from ctmasknet.weights.publish import model_card


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the author's .pth file")
    parser.add_argument("outdir", type=Path, help="folder to write")
    parser.add_argument("--name", help="the variant it must hold (default: recognise it)")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="how values are stored")
    parser.add_argument(
        "--metadata",
        type=Path,
        help="JSON file with what is known of the weights: classes, operating_point, metrics, training, dataset, "
        "license, note, caveat",
    )
    options = parser.parse_args(arguments)
    try:
        metadata = _metadata(options.metadata)
        model = load_released(options.checkpoint, options.name)
        config = model.config.to_dict()
        folder = write_weights(
            options.outdir,
            model.state_dict(),
            variant=model.variant.name,
            config=config,
            metadata=metadata,
            card=model_card(model.variant, config, metadata),
            dtype=getattr(torch, options.dtype),
        )
    except CTMaskNetError as error:
        print(f"convert_released: {error}", file=sys.stderr)
        return 2
    print(f"{model.variant.name}: wrote {folder}")
    return 0


def _metadata(path: Path | None) -> dict[str, object]:
    if path is None:
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a JSON object")
    return values


if __name__ == "__main__":
    sys.exit(main())
