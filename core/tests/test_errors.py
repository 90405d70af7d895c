"""The exception tree, and the one line that each error says about itself."""

from __future__ import annotations

import pickle

import pytest

import engineroom
from engineroom import errors
from engineroom.errors import (
    ConfigurationError,
    ContextLengthExceededError,
    EngineDeadError,
    EngineRoomError,
    InferenceError,
    ModelNotFoundError,
    NoSuitableHandlerError,
    QueueFullError,
    RequestTimeoutError,
    ResourceNotAvailableError,
    error_class,
)

PARENTS: dict[type[EngineRoomError], tuple[type[Exception], ...]] = {
    EngineRoomError: (Exception,),
    ModelNotFoundError: (EngineRoomError, LookupError),
    ResourceNotAvailableError: (EngineRoomError, RuntimeError),
    ConfigurationError: (EngineRoomError, ValueError),
    ContextLengthExceededError: (ConfigurationError,),
    InferenceError: (EngineRoomError, RuntimeError),
    NoSuitableHandlerError: (InferenceError,),
    EngineDeadError: (InferenceError,),
    RequestTimeoutError: (InferenceError,),
    QueueFullError: (InferenceError,),
}
every_class = pytest.mark.parametrize("cls", PARENTS)


def test_the_tree_is_the_one_that_is_documented() -> None:
    assert {cls: cls.__bases__ for cls in PARENTS} == PARENTS
    assert {cls.__name__ for cls in PARENTS} == set(errors.__all__) - {"error_class"}


@every_class
def test_every_class_is_public_and_drawn_in_the_tree(cls: type[EngineRoomError]) -> None:
    assert getattr(engineroom, cls.__name__) is cls
    assert cls.__name__ in (errors.__doc__ or "")


@every_class
def test_a_class_is_found_by_its_name(cls: type[EngineRoomError]) -> None:
    assert error_class(cls.__name__) is cls


@pytest.mark.parametrize("name", [None, "", "KeyError", "error_class"])
def test_an_unknown_name_is_an_inference_error(name: str | None) -> None:
    assert error_class(name) is InferenceError


@every_class
def test_each_class_begins_its_line_with_a_label_of_its_own(cls: type[EngineRoomError]) -> None:
    assert cls("went wrong").describe() == f"{cls.label}: went wrong"
    assert [other for other in PARENTS if other.label == cls.label] == [cls]


def test_the_label_is_not_said_twice() -> None:
    assert ModelNotFoundError("Model not found: 'm'").describe() == "Model not found: 'm'"
    again = QueueFullError(QueueFullError("8 wait", model_id="m").describe(), model_id="m")
    assert again.describe() == "Queue full: 8 wait (model 'm')"


def test_the_line_names_model_and_request() -> None:
    error = InferenceError("it broke", request_id="r-1", model_id="m-1")
    assert error.describe() == "Inference error: it broke (model 'm-1', request 'r-1')"


def test_what_the_message_names_is_not_named_again() -> None:
    error = InferenceError("model 'm-1' broke", request_id="r-1", model_id="m-1")
    assert error.describe() == "Inference error: model 'm-1' broke (request 'r-1')"


def test_a_short_id_that_is_part_of_a_word_is_still_named() -> None:
    error = InferenceError("something broke", request_id="1", model_id="m")
    assert error.describe() == "Inference error: something broke (model 'm', request '1')"


def test_a_message_of_several_lines_becomes_one() -> None:
    assert InferenceError("one\n  two\r\n\tthree\u2028four").describe() == (
        "Inference error: one two three four"
    )


@pytest.mark.parametrize("message", ["", "  \n "])
def test_an_error_without_a_message_still_says_something(message: str) -> None:
    assert InferenceError(message).describe() == "Inference error: no further details were given"


def test_context_fills_in_what_is_missing_and_keeps_what_is_there() -> None:
    error = InferenceError("it broke", model_id="first")
    assert error.with_context(request_id="r", model_id="second") is error
    assert (error.request_id, error.model_id) == ("r", "first")


@every_class
def test_an_error_survives_the_way_between_processes(cls: type[EngineRoomError]) -> None:
    error = pickle.loads(pickle.dumps(cls("it broke", request_id="r", model_id="m")))
    assert type(error) is cls
    assert (error.message, error.request_id, error.model_id) == ("it broke", "r", "m")
    assert str(error) == "it broke"
