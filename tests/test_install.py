"""The installer tells uv what the user's pip settings say."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "install.py"
spec = importlib.util.spec_from_file_location("install", SCRIPT)
assert spec is not None
assert spec.loader is not None
install = importlib.util.module_from_spec(spec)
spec.loader.exec_module(install)


def test_settings_of_pip_reach_uv() -> None:
    told = install.uv_environment(
        "global.index-url='https://mirror.example/simple'\n"
        "global.extra-index-url='https://a.example/simple https://b.example/simple'\n"
        "global.find-links='\\n/wheels\\n/more wheels'\n"
        "global.cert='/certs/ca.crt'\n"
        "freeze.timeout='1'\n"
    )
    assert told["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
    assert told["UV_INDEX"] == "https://a.example/simple https://b.example/simple"
    assert told["SSL_CERT_FILE"] == "/certs/ca.crt"
    assert "UV_HTTP_TIMEOUT" not in told  # another command's setting


def test_variables_go_before_files() -> None:
    lines = [
        ":env:.index-url='https://env.example'",
        "install.index-url='https://install.example'",
        "global.index-url='x'",
    ]
    for order in (lines, lines[::-1]):
        assert install.uv_environment("\n".join(order))["UV_DEFAULT_INDEX"] == "https://env.example"
    assert install.uv_environment("\n".join(lines[1:]))["UV_DEFAULT_INDEX"] == "https://install.example"


def test_without_settings_uv_chooses_versions_as_pip_does() -> None:
    assert install.uv_environment("") == {"UV_INDEX_STRATEGY": "unsafe-best-match"}


def test_what_uv_brought_without_its_library_is_brought_again_by_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = tmp_path / "pip"
    pip = [sys.executable, "-c", f"import sys; open({str(written)!r}, 'w').write(' '.join(sys.argv[1:]))"]
    assert install.repair(Path(sys.executable), pip) == 0
    assert not written.exists()
    monkeypatch.setattr(install, "loads", lambda python, package: package != "soundfile")
    assert install.repair(Path(sys.executable), pip) == 0
    asked = written.read_text().split()
    assert asked[0] == "install"
    assert "--force-reinstall" in asked
    assert asked[-1] == f"soundfile=={importlib.metadata.version('soundfile')}"
