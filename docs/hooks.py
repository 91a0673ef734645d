"""What the manual takes from elsewhere when it is built: the command reference from the parser, the table of sampling
options from `SamplingConfig`, and pages that live outside docs/."""

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from stablevsr.cli.parser import build_parser
from stablevsr.cli.upscale_options import sampling_fields
from stablevsr.sampling.config import SamplingConfig

ROOT = Path(__file__).parents[1]
# Pages of the manual that are kept where a reader of the repository looks for them.
OUTSIDE = {
    "recipes.md": "recipes/README.md",
    "benchmarks.md": "benchmarks/README.md",
    "comfyui.md": "integrations/comfyui/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
PAGES = {source: page for page, source in OUTSIDE.items()}
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, **rest: object) -> str:
    source = OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    markdown = between_pages(markdown, source)
    markdown = markdown.replace("<!-- commands -->", "\n".join(command_reference(build_parser())))
    return markdown.replace("<!-- sampling options -->", sampling_options())


def between_pages(text: str, source: str) -> str:
    """The text of the file `source`, its links between files of the repository turned into links between pages."""

    def turned(match: re.Match) -> str:
        path = os.path.normpath(os.path.join(os.path.dirname(source), match[1]))
        return f"]({PAGES.get(path, path).removeprefix('docs/')}{match[2] or ''})"

    return LINK.sub(turned, text)


def command_reference(parser: argparse.ArgumentParser, level: int = 2) -> Iterator[str]:
    """Markdown lines: for each command its description, its usage and a table of its options, group by group."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from one_command(command, level)
                yield from command_reference(command, level + 1)


def one_command(command: argparse.ArgumentParser, level: int) -> Iterator[str]:
    formatter = command._get_formatter()
    positional = [action for action in command._actions if not action.option_strings]
    commands = [action for action in positional if isinstance(action, argparse._SubParsersAction)]
    words = [command.prog, "[options]", *(formatter._format_args(action, action.metavar) for action in positional)]
    yield from ("", f"{'#' * level} {command.prog}", "", cell(command.description or ""), "")
    yield from () if commands else ("```", " ".join(words), "```", "")
    for group in command._action_groups:
        actions = [each for each in group._group_actions if each not in commands and each.help != argparse.SUPPRESS]
        if not actions:
            continue
        if group.title not in ("options", "positional arguments"):
            yield from (f"**{group.title.capitalize()}.** {cell(group.description or '')}", "")
        yield from ("| argument | meaning |", "| --- | --- |")
        for action in actions:
            names = formatter._format_action_invocation(action).replace("|", r"\|")
            needed = " (required)" if action.option_strings and action.required else ""
            yield f"| `{names}` | {cell(formatter._expand_help(action))}{needed} |"
        yield ""
    if command.epilog:
        title, _, examples = (command.epilog % {"prog": command.prog}).strip().partition("\n")
        yield from (title.capitalize(), "", "```", *(line.strip() for line in examples.splitlines()), "```", "")


def sampling_options() -> str:
    """A table of the fields of `SamplingConfig`, with their defaults."""
    defaults = SamplingConfig().flat()
    lines = ["| field | default | meaning |", "| --- | --- | --- |"]
    for name, field, _ in sampling_fields():
        choices = "; ".join(f"`{choice}`" for choice in field.metadata.get("choices", ()))
        meaning = cell(field.metadata["help"]) + (f" (one of {choices})" if choices else "")
        lines.append(f"| `{name}` | `{defaults[name]!r}` | {meaning} |")
    return "\n".join(lines)


def cell(text: str) -> str:
    """Text of the parser for a table cell."""
    return re.sub(r"\s+", " ", text).replace("|", r"\|").replace("<", "&lt;")
