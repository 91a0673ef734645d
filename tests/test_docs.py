"""The manual: it builds strictly and from nothing but this folder, and what it quotes exists."""

import ast
import logging
import re
import socket
from pathlib import Path

import pytest

import stablevsr
from stablevsr.cli.parser import build_parser
from stablevsr.cli.upscale_options import sampling_fields

ROOT = Path(__file__).parent.parent
ADDRESS = re.compile(r"(?:src|href)=\"?((?:https?:)?//[^\s\">]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manual, built with warnings as errors and without a network."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install '.[docs]'")
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: pip install '.[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    def refuse(*arguments: object) -> None:
        raise AssertionError("the manual is built without a network")

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(socket.socket, "connect", refuse)
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    logging.getLogger("mkdocs").handlers.clear()
    return folder


def test_every_public_name_has_an_entry(site: Path) -> None:
    page = (site / "api.html").read_text()
    assert not [name for name in stablevsr.__all__ if f'id="stablevsr.{name}"' not in page]
    assert stablevsr.UserError.__doc__.split(".")[0] in page  # the text of a docstring, not its name alone
    assert not [name for name, _, _ in sampling_fields() if f"<code>{name}</code>" not in page]


def test_every_command_and_option_has_an_entry(site: Path) -> None:
    page = (site / "commands.html").read_text()
    (commands,) = (action for action in build_parser()._actions if isinstance(action.choices, dict))
    for name, command in commands.choices.items():
        assert f'id="stablevsr-{name}"' in page
        for option in command._option_string_actions:
            assert re.search(rf"[ >]{option}[ ,<]", page), f"{name} {option}"
    assert "%(" not in page


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """Links are; scripts, styles, fonts and images are not."""
    for page in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text()):
            assert not ADDRESS.search(tag), f"{page.name}: {tag}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )[\"']?(?:https?:)?//", style.read_text()), style.name


def messages() -> list[str]:
    """Every text in the package's code, with an ellipsis for what is filled in."""
    found = []
    for path in (ROOT / "stablevsr").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_quoted_messages_exist() -> None:
    quoted = re.findall(r"^### `(.*)`$", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    known = messages()
    assert len(quoted) > 20
    for message in quoted:
        pattern = re.compile(".*".join(map(re.escape, message.split("…"))), re.S)
        assert any(map(pattern.search, known)), f"no message reads {message!r}"
