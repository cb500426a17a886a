import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile import Stage, read_stages
from pydantic_settings import BaseSettings

from cli.main import run
from index_service.settings import IndexSettings
from query_service.settings import QuerySettings
from rollout.settings import RolloutSettings

ROOT = Path(__file__).parents[2]
SERVICES = ("shard-0", "shard-1", "query", "rollout")
SETTINGS: Mapping[str, type[BaseSettings]] = {
    "index": IndexSettings,
    "query": QuerySettings,
    "rollout": RolloutSettings,
}
# Variables of the images that no settings class reads.
OTHER_VARIABLES = {"OMP_NUM_THREADS", "PATH", "PYTHONUNBUFFERED"}


def interpolated(value: Any) -> Any:
    """The compose file as it is with none of its variables set."""
    if isinstance(value, dict):
        return {key: interpolated(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [interpolated(entry) for entry in value]
    return re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", value) if isinstance(value, str) else value


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return interpolated(yaml.safe_load((ROOT / "docker-compose.yml").read_text()))


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    return read_stages(ROOT / "Dockerfile")


def image_name(service: Mapping[str, Any]) -> str:
    return re.fullmatch(r"twotower-(\w+):latest", service["image"]).group(1)


def environment(compose: Mapping[str, Any], stages: Mapping[str, Stage], service: str) -> dict[str, str]:
    """What the process sees: the image's variables, then the compose file's."""
    return stages[image_name(compose["services"][service])].environment | compose["services"][service]["environment"]


def settings_of(
    compose: Mapping[str, Any], stages: Mapping[str, Stage], service: str, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """The service's settings, read from that environment."""
    with monkeypatch.context() as patched:
        for name in ("REDIS_URL", "TWOTOWER_REDIS_URL"):
            patched.delenv(name, raising=False)
        for name, value in environment(compose, stages, service).items():
            if name not in OTHER_VARIABLES:
                patched.setenv(name, value)
        return SETTINGS[image_name(compose["services"][service])]()


def variables_of(settings: type[BaseSettings]) -> dict[str, str]:
    """Environment variable and default, as the manual writes it, of each setting."""
    variables = {}
    for name, field in settings.model_fields.items():
        if (settings, name) == (IndexSettings, "num_shards"):
            continue  # A part of TWOTOWER_SHARD.
        choices = getattr(field.validation_alias, "choices", [f"TWOTOWER_{name.upper()}"])
        variables[choices[-1]] = in_words(field.default) if not field.is_required() else "required"
    return variables


def in_words(default: Any) -> str:
    if default in ("", ()):
        return "empty"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if default is None:
        return "none"
    if isinstance(default, tuple):
        return f"`{';'.join(map(_layout, default))}`" if isinstance(default[0], tuple) else f"`{','.join(default)}`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def _layout(layout: tuple[tuple[str, ...], ...]) -> str:
    return ",".join(map("|".join, layout))


def test_every_image_is_built_by_one_service_from_a_stage_that_exists(compose, stages):
    built = {
        image_name(service): service["build"]["target"]
        for service in compose["services"].values()
        if "build" in service
    }
    assert built == {name: name for name in ("index", "query", "rollout", "trainer")}
    assert set(built) <= set(stages)
    assert all(service in compose["services"] for service in SERVICES)
    images = {service["image"] for service in compose["services"].values()}
    assert images == {"docker.io/valkey/valkey:8-alpine", *(f"twotower-{name}:latest" for name in built)}


def test_the_offline_override_replaces_only_the_image_of_redis(compose, stages):
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!reset", lambda loader, node: None)
    override = yaml.load((ROOT / "deploy/compose.offline.yml").read_text(), Loader)
    assert set(override["services"]) == {"redis"}
    assert override["services"]["redis"]["build"]["target"] in stages
    assert set(override["services"]["redis"]["build"]["secrets"]) <= set(compose["secrets"])
    # The override drops the check of the compose file, so the image must have its own.
    assert stages["redis"].command("HEALTHCHECK")[0] == "python3"
    assert stages["redis"].last("USER") == compose["services"]["redis"]["user"]


@pytest.mark.parametrize("image", ["index", "query", "rollout", "trainer"])
def test_images_run_a_command_that_exists_as_another_user_than_root(stages, image, capsys):
    stage = stages[image]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", stage.last("USER"))
    assert stage.last("STOPSIGNAL") == "SIGTERM"
    assert stage.command("ENTRYPOINT") == ["twotower"]
    assert run([*stage.command("CMD"), "--help"]) == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize("image", ["index", "query"])
def test_the_health_check_asks_where_the_service_listens(stages, image):
    port = stages[image].environment["TWOTOWER_ADDRESS"].removeprefix("0.0.0.0:")
    assert stages[image].last("EXPOSE") == port
    assert stages[image].command("HEALTHCHECK") == ["python", "-m", "towers.health", f"127.0.0.1:{port}"]


def test_torch_is_installed_in_the_trainer_only(stages):
    installed = {
        name: re.findall(r"--requirement /requirements/(\w+)\.txt", " ".join(a for _, a in stages[name].instructions))
        for name in ("index", "query", "rollout", "trainer")
    }
    assert installed == {
        "index": ["core", "index"],
        "query": ["core", "query"],
        "rollout": ["core"],
        "trainer": ["core", "trainer"],
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for requirements in (project["dependencies"], extras["index"], extras["query"]):
        assert not [line for line in requirements if line.startswith("torch")]
    assert [line for line in extras["trainer"] if line.startswith("torch")]


def test_the_build_sees_every_package_of_the_wheel():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {package.split("/")[0] for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    admitted = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert packages <= admitted
    assert {"pyproject.toml", "constraints.txt", "deploy/requirements.py", project["project"]["readme"]} <= admitted
    missing = {path for path in admitted if not (ROOT / path).exists()}
    assert missing <= {"LICENSE"}


@pytest.mark.parametrize("service", SERVICES)
def test_the_settings_of_a_service_are_valid_and_none_is_misspelt(compose, stages, service, monkeypatch):
    settings = settings_of(compose, stages, service, monkeypatch)
    known = set(variables_of(type(settings)))
    assert set(environment(compose, stages, service)) - OTHER_VARIABLES <= known
    assert settings.store == "/store"
    assert "store:/store" in compose["services"][service]["volumes"]


def test_the_addresses_lead_to_the_services(compose, stages, monkeypatch):
    settings = {name: settings_of(compose, stages, name, monkeypatch) for name in SERVICES}
    layout = tuple(
        (f"{name}:{shard.address.rpartition(':')[2]}",)
        for name, shard in sorted(settings.items(), key=lambda entry: getattr(entry[1], "shard", -1))
        if isinstance(shard, IndexSettings)
    )
    assert [(settings[name].shard, settings[name].num_shards) for name in ("shard-0", "shard-1")] == [(0, 2), (1, 2)]
    assert settings["query"].shards == settings["rollout"].shards == (layout,)
    query_port = settings["query"].address.rpartition(":")[2]
    assert settings["rollout"].query_services == (f"query:{query_port}",)
    assert compose["services"]["query"]["ports"] == [f"127.0.0.1:50051:{query_port}"]
    assert settings["query"].redis_url == "redis://redis:6379/0"
    assert [name for name, service in compose["services"].items() if service.get("ports")] == ["query"]


def test_nothing_waits_for_a_checkpoint_or_for_itself(compose, stages):
    started: set[str] = set()
    waiting = {name: service.get("depends_on", {}) for name, service in compose["services"].items()}
    while startable := [name for name in waiting.keys() - started if waiting[name].keys() <= started]:
        started.update(startable)
    assert started == set(waiting)
    for dependencies in waiting.values():
        for name, dependency in dependencies.items():
            if dependency["condition"] == "service_healthy":
                # Only the process's health: a service's own name would be NOT_SERVING until something is published.
                assert len(stages[image_name(compose["services"][name])].command("HEALTHCHECK")) == 4
                assert "healthcheck" not in compose["services"][name]


def test_containers_are_confined(compose):
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert (service.get("restart") == "unless-stopped") == (name != "trainer"), name
    volumes = {
        volume.partition(":")[0]
        for service in compose["services"].values()
        for volume in service.get("volumes", [])
        if not volume.startswith(".")
    }
    assert volumes == set(compose["volumes"])


def test_only_jobs_wait_for_a_profile(compose):
    assert [name for name, service in compose["services"].items() if service.get("profiles")] == ["trainer"]


@pytest.mark.parametrize("image", SETTINGS)
def test_the_manual_lists_every_setting_with_its_default(image):
    manual = (ROOT / "deploy/README.md").read_text()
    section = re.search(rf"^### {image}\n(.*?)(?=^#|^The trainer|\Z)", manual, re.DOTALL | re.MULTILINE).group(1)
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", section, re.MULTILINE))
    assert rows == variables_of(SETTINGS[image])


def test_the_manual_lists_every_variable_of_the_compose_file():
    manual = (ROOT / "deploy/README.md").read_text()
    section = manual[manual.index("## On one machine") : manual.index("## On several machines")]
    rows = {name: default.strip(" `") for name, default in re.findall(r"^\| `(\w+)` \|(.*?)\|", section, re.MULTILINE)}
    used = dict(re.findall(r"\$\{(\w+):?-([^}]*)\}", (ROOT / "docker-compose.yml").read_text()))
    assert rows == used
