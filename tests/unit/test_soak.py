import numpy as np

from services.local.soak import slope


def test_a_leak_shows_and_noise_does_not() -> None:
    at_s = np.arange(0, 1_800, 5.0)
    noise = np.random.default_rng(0).normal(0, 2, len(at_s))
    flat = slope("flat", list(zip(at_s, 200 + noise, strict=True)))
    assert flat.low < 0 < flat.high
    # Up and down between two trims of a heap, by more the longer it runs: no leak either.
    teeth = np.random.default_rng(1).uniform(0, 50 + at_s / 60)
    saw = slope("saw", list(zip(at_s, 200 + noise + teeth, strict=True)))
    assert saw.low < 6
    for swing in (0.0, teeth):
        leak = slope("leak", list(zip(at_s, 200 + noise + swing + at_s / 90, strict=True)))
        assert 0 < leak.low < 40 < leak.high
