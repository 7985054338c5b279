"""Which of several places decides: site, Slurm's options, folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.preset.choose import Chosen, Folders, choose_folders, choose_site, choose_slurm
from launcher.preset.config import UserConfig
from launcher.preset.reading import Loaded, read_config, read_preset
from launcher.preset.schema import Preset
from launcher.preset.search import user_folder
from launcher.preset.site import Site

ENVIRON = {"SBATCH_ACCOUNT": "env", "SBATCH_PARTITION": "env", "SBATCH_QOS": "env", "SBATCH_CONSTRAINT": "env"}


def site(**changes: object) -> Site:
    return Site.model_validate({"name": "delft", "source": "a test", "scheduler": "slurm", **changes})


def preset(tmp_path: Path, text: str = "", **options: object) -> Loaded[Preset]:
    path = tmp_path / "x.yaml"
    path.write_text(f"extends: tiny\n{text}")
    return read_preset(str(path), options=options)


def config(tmp_path: Path, text: str) -> Loaded[UserConfig]:
    folder = user_folder(tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(text)
    loaded = read_config(home=tmp_path)
    assert loaded is not None
    return loaded


def test_site_by_precedence(tmp_path: Path) -> None:
    own, typed = config(tmp_path, "site: b\n"), preset(tmp_path, "site: c\n")
    environ = {"FTLAUNCH_SITE": "a"}
    assert choose_site("z", environ=environ, config=own, preset=typed) == Chosen("z", "--site")
    assert choose_site(None, environ=environ, config=own, preset=typed) == Chosen("a", "$FTLAUNCH_SITE")
    assert choose_site(None, environ={}, config=own, preset=typed) == Chosen("b", f"{own.file}:1:1")
    assert choose_site(None, environ={}, config=None, preset=typed) == Chosen("c", f"{typed.file}:2:1")
    assert choose_site(None, environ={}, config=None, preset=preset(tmp_path)) == Chosen("local", "default")


def test_slurm_by_precedence(tmp_path: Path) -> None:
    own = config(tmp_path, "slurm: {account: own, partition: own}\n")
    typed = preset(tmp_path, "slurm: {account: typed, time: 3h}\n", **{"slurm.time": "2h", "slurm.reservation": "r"})
    at = site(default_account="s", default_partition="s", default_qos="s")
    assert choose_slurm(typed, at, environ=ENVIRON, config=own) == {
        "account": Chosen("typed", f"{typed.file}:2:9"),
        "partition": Chosen("own", f"{own.file}:1:23"),
        "qos": Chosen("env", "$SBATCH_QOS"),
        "time": Chosen("2h", "command line"),
        "reservation": Chosen("r", "command line"),
    }
    assert choose_slurm(preset(tmp_path), at, environ={}, config=None) == {
        key: Chosen("s", "site delft") for key in ("account", "partition", "qos")
    }


def test_no_slurm_options_without_slurm(tmp_path: Path) -> None:
    assert choose_slurm(preset(tmp_path, "slurm: {account: a}\n"), site(scheduler="none"), environ=ENVIRON, config=None) == {}


def test_hostile_environment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        choose_slurm(preset(tmp_path), site(), environ={"SBATCH_ACCOUNT": "a\n#SBATCH --uid=0"}, config=None)
    assert str(error.value) == r"slurm.account: $SBATCH_ACCOUNT is 'a\n#SBATCH --uid=0', which is no account"


def test_folders_by_precedence(tmp_path: Path) -> None:
    at = site(runs="/scratch/$USER/runs", images="${PROJECT}/images", data="/scratch/data")
    environ = {"USER": "me", "PROJECT": "/project", "FTLAUNCH_IMAGES": "images"}
    found = choose_folders(at, environ=environ, home=Path("/home/me"), cwd=tmp_path)
    assert found == Folders(Path("/scratch/me/runs"), tmp_path / "images", Path("/scratch/data"))


def test_folders_without_slurm(tmp_path: Path) -> None:
    found = choose_folders(site(scheduler="none"), environ={}, home=Path("/home/me"), cwd=tmp_path)
    cache = Path("/home/me/.cache/ftlaunch")
    assert found == Folders(tmp_path / "runs", cache / "images", cache / "data")
    environ = {"XDG_CACHE_HOME": "/var/cache", "FTLAUNCH_RUNS": "/runs"}
    found = choose_folders(site(scheduler="none"), environ=environ, home=Path("/home/me"), cwd=tmp_path)
    assert (found.runs, found.data) == (Path("/runs"), Path("/var/cache/ftlaunch/data"))


def test_slurm_site_without_folders_says_the_lines(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        choose_folders(site(data="/data"), environ={}, home=tmp_path, cwd=tmp_path)
    assert str(error.value) == (
        "runs: site delft says no folder for runs, images (write into your file of the site, or into a new "
        "~/.config/ftlaunch/sites/NAME.yaml below 'extends: delft': "
        "runs: /FOLDER/ON/THE/SHARED/FILE/SYSTEM/runs; images: /FOLDER/ON/THE/SHARED/FILE/SYSTEM/images; "
        "or set $FTLAUNCH_RUNS, $FTLAUNCH_IMAGES)"
    )


def test_slurm_site_with_folders_in_home_is_refused_with_the_three_lines(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "big").mkdir(parents=True)
    (tmp_path / "scratch").mkdir()
    (home / "scratch").symlink_to(tmp_path / "scratch")
    at = site(runs="~/runs", images=str(home / "images"), data=str(tmp_path / "scratch" / ".." / "home" / "data"))
    with pytest.raises(UsageError) as error:
        choose_folders(at, environ={"SCRATCH": "/scratch/me"}, home=home, cwd=tmp_path)
    assert str(error.value) == (
        f"runs: site delft puts runs, images, data into home {home}, whose quota a model fills (write into your file of the site, "
        "or into a new ~/.config/ftlaunch/sites/NAME.yaml below 'extends: delft': runs: $SCRATCH/ftlaunch/runs; "
        "images: $SCRATCH/ftlaunch/images; data: $SCRATCH/ftlaunch/data; or set $FTLAUNCH_RUNS, $FTLAUNCH_IMAGES, $FTLAUNCH_DATA)"
    )
    linked = site(runs="~/scratch/runs", images="~/scratch/images", data="~/scratch/data")
    assert choose_folders(linked, environ={}, home=home, cwd=tmp_path).runs == home / "scratch" / "runs"
    typed = {f"FTLAUNCH_{name}": str(home / "big") for name in ("RUNS", "IMAGES", "DATA")}
    assert choose_folders(at, environ=typed, home=home, cwd=tmp_path).runs == home / "big"
    here = site(scheduler="none", runs="~/runs")
    assert choose_folders(here, environ={}, home=home, cwd=tmp_path).runs == home / "runs"


def test_folder_with_a_variable_that_is_not_set(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        choose_folders(site(runs="$SCRATCH/runs", images="/i", data="/d"), environ={}, home=tmp_path, cwd=tmp_path)
    assert str(error.value) == "runs: site delft: runs: $SCRATCH/runs: $SCRATCH is not set"
