"""The files in cluster/: no key can be misspelt, the autoscaler brings up what a run asks for, and what they, the
pages and the sweeps' questions name exists in the product."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster_schemas as schemas
import jsonschema
import pytest
import yaml
from typer.main import get_command

from ipd_ray.cli import app
from ipd_ray.config import RunConfig, field_names, label_selector, load, preset_names

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster"
LAUNCHER, MANIFESTS = ("aws.yaml", "gcp.yaml"), ("kuberay-raycluster.yaml", "kuberay-rayjob.yaml")
CRDS = "KUBERAY_CRDS"
"""Environment variable: a folder with KubeRay's ray.io_rayclusters.yaml and ray.io_rayjobs.yaml."""

SCHEMAS = {
    "aws.yaml": schemas.launcher("aws"), "gcp.yaml": schemas.launcher("gcp"),
    "kuberay-raycluster.yaml": schemas.RAY_CLUSTER, "kuberay-rayjob.yaml": schemas.RAY_JOB,
}


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def autoscaling(name: str, content: Any) -> dict[str, Any]:
    """Check a file as Ray does before it uses it; return what Ray's autoscaler reads of it."""
    if name in LAUNCHER:
        from ray.autoscaler._private.util import prepare_config, validate_config

        config = prepare_config(copy.deepcopy(content))
        validate_config(config)
        return config
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = content["spec"] if content["kind"] == "RayCluster" else content["spec"]["rayClusterSpec"]
    return _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "x", "namespace": "x"}, "spec": cluster})


def check(name: str, content: Any) -> None:
    """Raise for whatever is wrong with it."""
    jsonschema.Draft202012Validator(SCHEMAS[name]).validate(content)
    for type_name, node in autoscaling(name, content)["available_node_types"].items():
        if node["min_workers"] > node["max_workers"]:
            raise ValueError(f"{type_name}: min_workers={node['min_workers']} > max_workers={node['max_workers']}")


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every key."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        if isinstance(content, dict):
            yield (*path, key)
        yield from places(value, (*path, key))


def renamed(content: Any, path: tuple[Any, ...]) -> Any:
    """Return a copy in which one key has a letter too many."""
    changed = copy.deepcopy(content)
    place = changed
    for step in path[:-1]:
        place = place[step]
    place[path[-1] + "x"] = place.pop(path[-1])
    return changed


@pytest.mark.parametrize("name", [*LAUNCHER, *MANIFESTS])
def test_every_misspelt_key_is_found(name: str):
    content = json.loads(json.dumps(read(name)))  # without YAML's aliases: each place is one of its own
    check(name, content)
    paths = list(places(content))
    assert len(paths) > 60
    found = []
    for path in paths:
        try:
            check(name, renamed(content, path))
        except (jsonschema.ValidationError, ValueError):
            continue
        found.append(path)
    assert not found


@pytest.mark.parametrize("name", [*LAUNCHER, *MANIFESTS])
def test_least_above_most_is_found(name: str):
    content = read(name)
    if name in LAUNCHER:
        content["available_node_types"]["imagination"]["min_workers"] = 9
    else:
        spec = content["spec"].get("rayClusterSpec", content["spec"])
        spec["workerGroupSpecs"][0]["minReplicas"] = 9
    with pytest.raises(ValueError, match="imagination: min_workers=9 > max_workers=8"):
        check(name, content)


def test_job_brings_the_cluster_of_the_other_manifest():
    assert read("kuberay-rayjob.yaml")["spec"]["rayClusterSpec"] == read("kuberay-raycluster.yaml")["spec"]


def strict(schema: Any) -> Any:
    """Return an openAPIV3Schema as a JSON schema that takes no key it does not name."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: strict(value) for key, value in schema.items()}
    if changed.pop("x-kubernetes-int-or-string", False):
        changed.pop("type", None)
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        changed.setdefault("additionalProperties", False)
    return changed


@pytest.mark.parametrize(("name", "crd"), [(MANIFESTS[0], "rayclusters"), (MANIFESTS[1], "rayjobs")])
def test_manifest_fits_the_operators_own_schema(name: str, crd: str):
    if CRDS not in os.environ:
        pytest.skip(
            f"{CRDS} is not set: put ray.io_{crd}.yaml of KubeRay (helm-chart/kuberay-operator/crds) into a folder and "
            f"name the folder in {CRDS}"
        )
    versions = yaml.safe_load((Path(os.environ[CRDS]) / f"ray.io_{crd}.yaml").read_text())["spec"]["versions"]
    schema = next(v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1")
    content = read(name)
    del content["metadata"]  # of Kubernetes itself
    jsonschema.validate(content, strict(schema) | {"required": ["apiVersion", "kind", "spec"]})


def test_node_configs_are_what_ec2_takes():
    botocore = pytest.importorskip("botocore.session", reason="botocore, which has EC2's own model, is not installed")
    from botocore.validate import ParamValidator

    model = botocore.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for node in read("aws.yaml")["available_node_types"].values():
        asked = {**node["node_config"], "MinCount": 1, "MaxCount": 1}
        assert not ParamValidator().validate(asked, model).generate_report()


# ---- which machines come up

def launched(name: str, requests: list[tuple[int, dict[str, float], str]]) -> dict[str, int]:
    """Return {node type: machines} that Ray's second autoscaler brings up for (how many, resources, labels)."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.common_pb2 import LabelSelector, LabelSelectorConstraint

    class Silent:
        def __getattr__(self, _: str) -> Any:
            return lambda *args, **kwargs: None

    config = AutoscalingConfig(autoscaling(name, read(name)), skip_content_hash=True)
    asked = []
    for count, resources, labels in requests:
        request = ResourceRequestUtil.make(resources)
        request.label_selectors.append(LabelSelector(label_constraints=[
            LabelSelectorConstraint(label_key=k, operator="LABEL_OPERATOR_IN", label_values=[v])
            for k, v in label_selector(labels).items()
        ]))
        asked += [request] * count
    reply = ResourceDemandScheduler(Silent()).schedule(SchedulingRequest(
        node_type_configs=config.get_node_type_configs(), max_num_nodes=config.get_max_num_nodes(),
        disable_launch_config_check=True, resource_requests=ResourceRequestUtil.group_by_count(asked),
    ))
    return {launch.instance_type: launch.count for launch in reply.to_launch if "head" not in launch.instance_type}


def settings() -> RunConfig:
    """Return the config of the run that the manifest of the job submits."""
    words = shlex.split(read("kuberay-rayjob.yaml")["spec"]["entrypoint"])
    return load(words[words.index("--preset") + 1], None, [w for w in words if re.match(r"\w+\.\w+=", w)])


@pytest.mark.parametrize("name", [*LAUNCHER, *MANIFESTS])
def test_imagination_goes_to_spot_machines_and_distillation_to_lasting_ones(name: str):
    from ipd_ray.distributed.cluster import cpus

    runtime = settings().runtime
    actor = {"CPU": cpus(runtime.threads), "GPU": runtime.gpus_per_actor}
    worker = {"CPU": cpus(runtime.train_threads), "GPU": 1.0}
    assert launched(name, [(3, actor, runtime.actor_labels)]) == {"imagination": 3}
    assert launched(name, [(100, actor, runtime.actor_labels)]) == {"imagination": 8}
    assert launched(name, [(runtime.workers, worker, runtime.worker_labels)]) == {"distillation": runtime.workers}


# ---- what the texts name

PAGES = (FOLDER / "README.md", ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
QUESTIONS = sorted((ROOT / "tune_configs").glob("*.yaml"))


def shell_commands() -> Iterator[list[str]]:
    """Yield the words of every `ipd-ray` command in the pages' code, at the head of the sweeps' questions, and in the
    manifests. What may be left out is in brackets, `a|b` is one of them."""
    blocks = [read("kuberay-rayjob.yaml")["spec"]["entrypoint"]]
    for page in PAGES:
        text = page.read_text()
        blocks += re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
        blocks += (code.replace("\n", " ") for code in re.findall(r"`(ipd-ray [^`]+)`", text))
    blocks += (line[1:] for path in QUESTIONS for line in path.read_text().splitlines() if line.startswith("#"))
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        for found in re.findall(r"\bipd-ray (?!\$|:)(\w.*?)(?=$|  +ipd-ray )", line):
            yield [word.strip("[]") for word in shlex.split(found, comments=True)]


def test_commands_and_options_of_the_texts_exist():
    seen = set()
    for words in shell_commands():
        while words:
            command: Any = get_command(app)
            while hasattr(command, "commands"):
                names = words.pop(0).split("|")
                seen |= set(names)
                assert set(names) <= command.commands.keys()
                command = command.commands[names[0]]
            own, words = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
            options = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
            assert {word for word in own if word.startswith("--")} <= options
            assert all((ROOT / word).exists() for word in own if word.startswith(("tune_configs/", "benchmarks/")))
    assert {"run", "submit", "jobs", "doctor", "tune", "prune", "export"} <= seen


def test_fields_and_presets_of_the_texts_exist():
    sections = {name.split(".")[0] for name in field_names()}
    seen = set()
    for path in {*FOLDER.iterdir(), *PAGES, *QUESTIONS}:
        text = path.read_text()
        seen |= {f"{section}.{field}" for section, field in re.findall(r"(?<![\w./-])(\w+)\.(\w+)\b(?!\()", text)
                 if section in sections}
        assert set(re.findall(r"--preset ([\w-]+)", text)) <= set(preset_names())
    assert {"runtime.store", "runtime.actor_labels", "runtime.worker_labels"} <= seen
    assert seen <= set(field_names())


def test_every_override_of_the_texts_is_a_valid_one():
    overrides = [w for words in shell_commands() for w in words if re.match(r"\w+\.\w+=", w)]
    assert len(overrides) > 10
    for word in overrides:
        load(None, None, ["runtime.engine=ray", word])


def test_example_of_the_costs_says_what_its_formula_gives(capsys: pytest.CaptureFixture[str]):
    code, said = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", (FOLDER / "README.md").read_text(), re.S)[0]
    exec(code, {})
    assert capsys.readouterr().out == said


# ---- the image

def dockerfile() -> list[tuple[str, str]]:
    """Return (instruction, rest) in order, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (FOLDER / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_image_is_made_of_what_is_there():
    known = {"FROM", "ARG", "USER", "WORKDIR", "ENV", "COPY", "RUN"}
    declared: set[str] = set()
    for instruction, rest in dockerfile():
        assert instruction in known
        assert set(re.findall(r"\$\{?(\w+)", rest)) <= declared
        if instruction == "ARG":
            declared.add(rest.partition("=")[0])
        if instruction == "FROM":
            declared = set()  # an argument from before FROM is unset after it
        if instruction == "COPY":
            *sources, target = [word for word in rest.split() if not word.startswith("--")]
            assert target.startswith("./")
            assert all((ROOT / source).exists() for source in sources)


def test_image_has_the_versions_of_the_constraints_and_no_root():
    steps = dockerfile()
    arguments = dict(rest.split("=", 1) for instruction, rest in steps if instruction == "ARG")
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert arguments["RAY_VERSION"] == pins["ray"] == read("kuberay-raycluster.yaml")["spec"]["rayVersion"]
    assert arguments["PYTHON"] == "py" + "".join(
        re.search(r"Python (\d+)\.(\d+)", (ROOT / "constraints.txt").read_text()).groups()  # type: ignore[union-attr]
    )
    pinned = dict(re.findall(r"([\w-]+)==([\w.]+)", " ".join(rest for _, rest in steps)))
    assert pinned and all(pins.get(name, version) == version for name, version in pinned.items())
    assert [rest for instruction, rest in steps if instruction == "USER"] == ["1000"]
