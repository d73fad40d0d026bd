"""Hugging Face transformers, built from small configs with random weights: is each pruned exactly?

    python benchmarks/zoo_transformers.py [NAME …]

Needs an environment with transformers beside slimline; nothing is downloaded.
"""

from __future__ import annotations

import transformers_media as media
import transformers_text as text
from zoo import Case, main


def cases() -> dict[str, Case]:
    """Every model of the sweep."""
    read = {**text.encoders(), **text.decoders(), **text.sequences()}
    seen = {**media.images(), **media.detection(), **media.video_and_text()}
    return {**read, **seen, **media.sound_and_series()}


if __name__ == "__main__":
    main("transformers", cases(), {}, __doc__)
