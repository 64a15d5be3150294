"""Plug-ins: only the named one is loaded, a broken one hurts nobody else, and every error names the pip command."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from tgi_gateway import plugins
from tgi_gateway.backend import API_VERSION, BackendPlugin, Capabilities
from tgi_gateway.errors import PluginError

GOOD = """
from tgi_gateway.backend import BackendPlugin, Capabilities
from tgi_gateway.hooks import hookimpl

def create(options):
    raise NotImplementedError

@hookimpl
def tgi_backend():
    return BackendPlugin({name!r}, "A toy", Capabilities(), create, api_version={version})
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An import path on which distributions can be written, as pip would install them."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(site: Path, name: str, source: str, *, distribution: str | None = None) -> None:
    distribution = distribution or f"toy-{name}"
    module = f"toy_{name}_{abs(hash((str(site), source)))}"
    (site / f"{module}.py").write_text(source)
    info = site / f"{distribution.replace('-', '_')}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[tgi_gateway.backends]\n{name} = {module}\n")
    importlib.invalidate_caches()


def test_a_named_plugin_is_loaded(site: Path) -> None:
    install(site, "toy", GOOD.format(name="toy", version=API_VERSION))
    assert plugins.load("toy").summary == "A toy"


def test_loading_one_plugin_imports_no_other(site: Path) -> None:
    install(site, "one", GOOD.format(name="one", version=API_VERSION))
    install(site, "two", "raise RuntimeError('imported')")
    assert plugins.load("one").name == "one"
    assert "two" in plugins.names()


def test_a_published_backend_that_is_missing_names_its_pip_command() -> None:
    with pytest.raises(PluginError) as error:
        plugins.load("neuron")
    assert 'pip install "tgi-gateway[neuron]"' in str(error.value)
    assert "echo" in str(error.value)


def test_an_unknown_name_lists_what_is_installed() -> None:
    with pytest.raises(PluginError, match=r"there is no backend `abacus`; installed: .*echo"):
        plugins.load("abacus")


def test_an_import_error_is_told_with_its_cause_and_the_way_out(site: Path) -> None:
    install(site, "broken", "import no_such_runtime", distribution="toy-broken")
    with pytest.raises(PluginError) as error:
        plugins.load("broken")
    assert "No module named 'no_such_runtime'" in str(error.value)
    assert "pip install --upgrade --force-reinstall toy-broken" in str(error.value)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("", "no `tgi_backend` hook"),
        (
            "from tgi_gateway.hooks import hookimpl\n@hookimpl\ndef tgi_backend():\n    return 3\n",
            "returns a BackendPlugin; got int",
        ),
        ("from tgi_gateway.hooks import hookimpl\n@hookimpl\ndef tgi_bakend():\n    pass\n", "tgi_bakend"),
        (GOOD.format(name="other", version=API_VERSION), "calls itself `other`"),
        ("import sys\nsys.exit('boom')", r"SystemExit: boom, in line 2 of .*toy_defective_\w+\.py"),
        ("x = 1\nif x\n    pass\n", r"SyntaxError: expected ':', in line 2 of .*toy_defective_\w+\.py"),
        (
            GOOD.format(name="defective", version=API_VERSION).replace(
                "Capabilities()", "Capabilities(features=frozenset({'temperature', 'top_k'}))"
            ),
            r"declares features that do not exist: temperature; known are .*sampling",
        ),
        (
            "from tgi_gateway.backend import Flag\nFlag('n-threads', int, 1, 'Threads.')\n",
            r"named as it is typed, such as --n-threads; got 'n-threads', in line 2 of .*toy_defective_\w+\.py",
        ),
    ],
)
def test_a_defective_plugin_is_a_plugin_error(site: Path, source: str, text: str) -> None:
    install(site, "defective", source)
    with pytest.raises(PluginError, match=text):
        plugins.load("defective")


@pytest.mark.parametrize("version", [API_VERSION, API_VERSION - 1])
def test_this_interface_version_and_the_one_before_are_accepted(site: Path, version: int) -> None:
    install(site, "toy", GOOD.format(name="toy", version=version))
    assert plugins.load("toy").api_version == version


def test_a_plugin_that_names_no_version_is_one_of_the_first(site: Path) -> None:
    install(site, "toy", GOOD.replace(", api_version={version}", "").format(name="toy"))
    assert plugins.load("toy").api_version == 1


@pytest.mark.parametrize(
    ("version", "mend"), [(API_VERSION + 1, "upgrade tgi-gateway"), (API_VERSION - 2, "upgrade toy-toy")]
)
def test_another_interface_version_is_refused_with_what_to_upgrade(site: Path, version: int, mend: str) -> None:
    install(site, "toy", GOOD.format(name="toy", version=version))
    with pytest.raises(PluginError, match=mend):
        plugins.load("toy")


def test_the_list_has_good_and_broken_plugins(site: Path) -> None:
    install(site, "toy", GOOD.format(name="toy", version=API_VERSION))
    install(site, "broken", "import no_such_runtime")
    found = {item.name: item for item in plugins.installed()}
    assert found["toy"].version == "1.2"
    assert found["toy"].distribution == "toy-toy"
    assert isinstance(found["toy"].plugin, BackendPlugin)
    assert found["toy"].plugin.capabilities == Capabilities()
    assert found["toy"].problem is None
    assert found["broken"].plugin is None
    assert "no_such_runtime" in (found["broken"].problem or "")


def test_listing_every_backend_imports_no_heavy_library() -> None:
    code = (
        "import sys; from tgi_gateway import plugins; plugins.installed();"
        "print([m for m in ('torch', 'transformers', 'grpc', 'tokenizers', 'huggingface_hub') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
