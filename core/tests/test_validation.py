"""The checks of a handler: each refusal names the plugin, the method and the remedy."""

from __future__ import annotations

import pytest
from core_doubles import PlainHandler, bare_registry

from engineroom import ConfigurationError, InferenceHandler, TokenHandler
from engineroom.handlers.base import API_VERSION
from engineroom.handlers.validation import HANDLER_METHODS, validate_handler
from engineroom.testing import EchoHandler


def handler(**methods):
    """A good handler, but for what a test gives."""
    return type("Mine", (PlainHandler,), {"__module__": "my_package", **methods})(name="mine")


def refusal(given) -> str:
    found = bare_registry()
    with pytest.raises(ConfigurationError) as caught:
        found.register(given)
    assert not found.handlers
    return caught.value.message


def test_a_good_handler_passes_and_is_given_back():
    echo = EchoHandler()
    assert validate_handler(echo) is echo


def test_every_method_of_the_contract_is_checked():
    public = {name for name in vars(InferenceHandler) if not name.startswith("_")}
    assert public - {"name", "api_version"} == HANDLER_METHODS


def test_a_class_is_told_to_be_an_instance():
    assert refusal(EchoHandler).endswith("write EchoHandler()")


def test_what_is_no_handler_is_told_what_to_derive_from():
    message = refusal(object())
    assert "engineroom.InferenceHandler" in message and "object" in message


@pytest.mark.parametrize("name", ["", " mine ", None, 7], ids=repr)
def test_a_handler_needs_a_name(name):
    mine = handler()
    mine.name = name
    message = refusal(mine)
    assert "my_package.Mine" in message and 'set name = "my_runtime"' in message


def test_a_handler_without_any_name_is_refused():
    class Nameless(TokenHandler):
        def can_handle(self, loaded_model):
            return True

        async def generate_tokens(self, loaded_model, request):
            yield

    assert "it has no name" in refusal(Nameless())


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        ("2.0", "pip install --upgrade engineroom"),
        ("0.9", "upgrade the plugin"),
        ("one", f'write api_version = "{API_VERSION}"'),
        ("", f'write api_version = "{API_VERSION}"'),
        (1.0, f'write api_version = "{API_VERSION}"'),
        (None, f'write api_version = "{API_VERSION}"'),
    ],
)
def test_another_api_version_is_refused_with_what_to_upgrade(version, remedy):
    message = refusal(handler(api_version=version))
    assert "'mine'" in message and remedy in message


@pytest.mark.parametrize("version", ["1", "1.0", "1.7", "1.0.3"])
def test_a_minor_version_does_not_matter(version):
    assert validate_handler(handler(api_version=version))


async def _infer_without_request(self, loaded_model): ...
async def _infer_with_more(self, loaded_model, request, temperature): ...
async def _infer_swapped(self, request, loaded_model): ...
async def _infer_by_keyword(self, loaded_model, *, request): ...
async def _infer_option_first(self, verbose=False, loaded_model=None, request=None): ...
async def _infer_anything(self, *args, **kwargs): ...
def _infer_plain(self, loaded_model, request): ...
async def _infer_generator(self, loaded_model, request):
    yield "x"


async def _stream_coroutine(self, loaded_model, request): ...
def _stream_plain(self, loaded_model, request): ...
def _stream_generator(self, loaded_model, request):
    yield "x"


async def _can_handle_async(self, loaded_model): ...
def _can_handle_renamed(self, model): ...
async def _load_extra(self, config, device): ...
def _unload_plain(self, loaded_model): ...


@pytest.mark.parametrize(
    ("method", "function", "problem"),
    [
        ("infer", _infer_without_request, "lacks the parameter 'request'"),
        ("infer", _infer_with_more, "'temperature' that it will not be given"),
        ("infer", _infer_swapped, "another order"),
        ("infer", _infer_by_keyword, "'request' by keyword only"),
        ("infer", _infer_option_first, "another order"),
        ("infer", _infer_anything, "lacks the parameter 'loaded_model'"),
        ("infer", _infer_plain, "must be 'async def'"),
        ("infer", _infer_generator, "must be 'async def'"),
        ("infer", None, "is not a method"),
        ("stream_infer", _stream_coroutine, "yield its pieces"),
        ("stream_infer", _stream_plain, "yield its pieces"),
        ("stream_infer", _stream_generator, "yield its pieces"),
        ("can_handle", _can_handle_async, "must be 'def'"),
        ("can_handle", _can_handle_renamed, "lacks the parameter 'loaded_model'"),
        ("load_model", _load_extra, "'device'"),
        ("unload_model", _unload_plain, "must be 'async def'"),
        ("capabilities", frozenset(), "is not a method"),
    ],
)
def test_a_method_that_is_written_wrong_is_named_with_what_to_write(method, function, problem):
    message = refusal(handler(**{method: function}))
    assert problem in message
    assert message.startswith(f"handler 'mine' (my_package.Mine).{method}")
    assert "write `" in message and f"def {method}(self" in message


def test_more_parameters_with_defaults_are_welcome():
    async def infer(self, loaded_model, request, verbose=False, *rest, **more): ...

    @staticmethod
    def can_handle(loaded_model):
        return True

    assert validate_handler(handler(infer=infer, can_handle=can_handle))
