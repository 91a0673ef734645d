"""The simulation of a film on many workers, and the example for Kubernetes."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from stablevsr.cli.parser import build_parser

ROOT = Path(__file__).parents[1]


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import scaling

    yield scaling
    sys.modules.pop("scaling")


@pytest.fixture
def costs(scaling: ModuleType) -> object:
    return scaling.Costs(steps=2, frame_step=1.0, flow=0.5, decode=0.25, unit=3.0, start=10.0, write=0.125)


def test_a_scene_takes_what_its_parts_take(scaling: ModuleType, costs: object) -> None:
    one = 10.0 + 4 * (2 * 1.0 + 0.25) + 3 * 0.5 + 3.0
    assert scaling.Simulation(costs, [4], 1).run() == one + 4 * 0.125
    assert scaling.Simulation(costs, [4, 4], 1).run() == one + (one - 10) + 4 * 0.125  # the first is written meanwhile
    assert scaling.Simulation(costs, [4, 4], 2).run() == one + 8 * 0.125
    assert scaling.Simulation(costs, [4, 4], 9).run() == one + 8 * 0.125  # no more workers than scenes


def test_the_longest_is_first_and_the_output_is_in_order(scaling: ModuleType, costs: object) -> None:
    costs = replace(costs, start=0.0, unit=0.0, flow=0.0, decode=0.0, steps=1, write=1.0)
    simulation = scaling.Simulation(costs, [1, 5, 2, 4], 2)
    assert simulation.run() == 6.0 + 12.0  # the first scene is the last to be sampled
    assert simulation.ended == [6.0, 5.0, 6.0, 4.0]


def test_segments_wait_for_their_neighbors_and_no_longer(scaling: ModuleType, costs: object) -> None:
    costs = replace(costs, start=0.0, unit=0.0, flow=0.0, decode=0.0, steps=4, write=0.0)
    assert scaling.segments_of(10, 4) == [4, 3, 3]
    assert scaling.Simulation(costs, [12], 1, 4).run() == 12 * 4.0
    assert scaling.Simulation(costs, [12], 3, 4).run() == 4 * 4.0
    assert scaling.Simulation(costs, [10], 3, 4).run() == 4 * 4.0  # the longest segment sets the pace
    assert scaling.Simulation(costs, [12], 2, 4).run() >= 12 * 4.0 / 2


def test_workers_that_die_cost_time_but_no_work(scaling: ModuleType, costs: object) -> None:
    scenes = [20] * 30
    calm = scaling.Simulation(costs, scenes, 4)
    stormy = scaling.Simulation(replace(costs, failure=100.0), scenes, 4)
    assert calm.run() < stormy.run()
    assert stormy.deaths > 5
    assert stormy.busy == pytest.approx(calm.busy)


def test_more_workers_are_never_slower_down_to_the_longest_scene(scaling: ModuleType, costs: object) -> None:
    scenes = scaling.film()[:300]
    ended = []
    for workers in scaling.WORKERS:
        simulation = scaling.Simulation(costs, scenes, workers)
        simulation.run()
        ended.append(max(simulation.ended))
    assert ended == sorted(ended, reverse=True)
    assert ended[-1] == pytest.approx(costs.start + costs.of_scene(max(scenes)))


def test_the_tables_in_the_text_are_those_of_the_results(scaling: ModuleType) -> None:
    text = scaling.DOCS.read_text()
    found = json.loads((scaling.RESULTS / "scaling.json").read_text())
    assert set(re.findall(r"<!-- table: (\w+) -->", text)) == {"seams", *found["results"]}
    assert scaling.with_tables(text, found) == text, "run python benchmarks/scaling.py"


def test_the_example_for_kubernetes_says_what_a_run_needs() -> None:
    """Without the operator's schema: read the fields that matter as it would."""
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((ROOT / "docs/examples/kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    program, *arguments = job["spec"]["entrypoint"].split()
    options = build_parser().parse_args(arguments)
    (workers,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (program, options.cluster, options.device) == ("stablevsr", "local", "cuda")
    assert options.workers == workers["replicas"] == workers["maxReplicas"] >= workers["minReplicas"]
    pods = [job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"], workers["template"]["spec"]]
    for pod in pods:
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
        assert all(Path(path).is_relative_to(mounts["films"]) for path in (*options.paths, options.weights))
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert pods[0]["securityContext"] == pods[1]["securityContext"]  # a workspace belongs to one user
    assert len({pod["containers"][0]["image"] for pod in pods}) == 1
    assert pods[1]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in pods[0]["containers"][0]["resources"]["limits"]
