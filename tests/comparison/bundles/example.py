"""Made-up results of two bundles on two videos of three chunks."""

import numpy as np

from fxq.comparison.bundles.results import BundleResults, BundleRow, Cost


def row(name, forced, **changed):
    forced = np.array(forced, float)
    given = {
        "bits": "W8A8",
        "size_ratio": 0.593,
        "free": forced - 2 * np.arange(forced.shape[1]),
        "ssim": np.array([0.99, 0.97]),
        "cost": Cost(seconds=np.full(forced.shape, 0.25), peak=1_500_000_000),
        "metrics": {},
    }
    return BundleRow(name=name, forced=forced, **(given | changed))


def results(**changed):
    given = {
        "title": "tiny: 2 bundles beside full precision, 2 videos",
        "command": "fxq compare --bundles a b",
        "date": "2026-11-29",
        "environment": {"fxq": "0.1.0"},
        "settings": {"model": "tiny", "seeds": [1]},
        "space": "pixels",
        "memory": "allocated on the GPU",
        "prompts": ("a red cat", "a | dog <b>"),
        "full": Cost(seconds=np.array([[9.0, 0.5, 0.5], [0.5, 0.5, 0.5]]), peak=3_000_000_000),
        "full_metrics": {},
        "rows": (row("a", [[50, 48, 46], [44, 31.25, 47]]), row("b", [[40, 39, 38], [37, 36, 35]], bits="W4A8")),
        "clips": ("videos/side_by_side/001.mp4", "videos/side_by_side/002.mp4"),
        "frames_per_second": 8.0,
        "decoding": 0.75,
    }
    return BundleResults(**(given | changed))
