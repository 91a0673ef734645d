"""One run on many machines: clips are divided into scenes, which are sampled anywhere and joined in one place.

No guidance crosses a scene cut, and noise is a function of (seed, frame, step): a scene that is sampled on its own has
the bits that it has in a run over the whole clip.

    units.py      the scenes of a clip, and how they are shared out
    run_unit.py   samples one scene into a file of lossless pictures
    pieces.py     those files
    job.py        one clip: its workspace, its units, and how their pictures become the output
    shard.py      `--shard I/N`: processes that know nothing of each other but a shared folder
    upscale.py, driver.py, ray_pool.py, worker.py, connect.py, local_ray.py    `--cluster`: the same on a Ray cluster
"""

from stablevsr.cluster.connect import Cluster
from stablevsr.cluster.description import ModelDescription
from stablevsr.cluster.job import Result
from stablevsr.cluster.upscale import upscale_on_cluster

__all__ = ["Cluster", "ModelDescription", "Result", "upscale_on_cluster"]
