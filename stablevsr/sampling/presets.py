"""Named settings of `sample_video`, from the published ones to fast ones; the README compares them."""

from stablevsr.sampling.guidance import PUBLISHED, Guidance

PRESETS: dict[str, dict[str, object]] = {
    "exact": {"steps": 50, "sampler": "ddpm", "guidance": PUBLISHED},
    "balanced": {"steps": 20, "sampler": "ddpm", "guidance": PUBLISHED},
    # Needs weights with a tiny decoder. That one costs no quality; half the flow's size costs a little.
    "fast": {"steps": 10, "sampler": "ddpm", "guidance": Guidance(tiny=True, half_flow=True)},
}
