"""The attention over the cache, against a dense one written down slowly."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st

from engineroom_hf_transformers import attention
from engineroom_hf_transformers.attention import Recorder, Span, Step
from engineroom_hf_transformers.cache import LayerShape, SlotCache
from engineroom_hf_transformers.kernels import Call

LENGTH = 48
WIDTH, VALUE = 8, 6


def dense(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    call: Call,
) -> torch.Tensor:
    """One request, head by head and token by token, in double precision."""
    heads, count, _ = query.shape
    shared = heads // keys.shape[0]
    found = np.zeros((count, heads, values.shape[-1]))
    for head in range(heads):
        k = keys[head // shared].double().numpy()
        v = values[head // shared].double().numpy()
        for i in range(count):
            position = start + i
            first = 0 if call.window is None else max(0, position + 1 - call.window)
            scores = k[first : position + 1] @ query[head, i].double().numpy() * call.scaling
            if call.softcap is not None:
                scores = call.softcap * np.tanh(scores / call.softcap)
            if call.sinks is not None:
                scores = np.append(scores, float(call.sinks[head]))
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            if call.sinks is not None:
                weights = weights[:-1]
            found[i, head] = weights @ v[first : position + 1]
    return torch.tensor(found)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    """As engines compute."""
    with torch.inference_mode():
        yield


class Scene:
    """Requests with random keys and values, some of which are in the cache already."""

    def __init__(
        self,
        seed: int,
        slots: Sequence[int],
        cached: Sequence[int],
        counts: Sequence[int],
        *,
        groups: int = 2,
        heads: int = 4,
        kernel: str = "sdpa",
        window: int | None = None,
        softcap: float | None = None,
        sinks: bool = False,
    ) -> None:
        random = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=random) * 2

        shape = LayerShape(groups, WIDTH, VALUE, torch.float32, torch.device("cpu"))
        self.cache = SlotCache({7: shape}, 6, LENGTH)
        # What lies beyond a request's own is what another one left.
        self.cache._keys[7].copy_(normal(*self.cache._keys[7].shape))
        self.cache._values[7].copy_(normal(*self.cache._values[7].shape))
        self.spans: list[Span] = []
        row = 0
        for slot, start, count in zip(slots, cached, counts, strict=True):
            self.spans.append(Span(row, slot, start, count))
            row += count
        self.call = Call(
            layer=7,
            query=normal(1, heads, row, WIDTH),
            key=normal(1, groups, row, WIDTH),
            value=normal(1, groups, row, VALUE),
            scaling=0.3,
            window=window,
            softcap=softcap,
            sinks=normal(heads) if sinks else None,
            kernel=kernel,
        )

    def expected(self) -> torch.Tensor:
        found = []
        for span in self.spans:
            rows = slice(span.row, span.row + span.count)
            keys = self.cache._keys[7][span.slot].clone()
            values = self.cache._values[7][span.slot].clone()
            keys[span.start : span.end] = self.call.key[0, :, rows].transpose(0, 1)
            values[span.start : span.end] = self.call.value[0, :, rows].transpose(0, 1)
            found.append(
                dense(
                    self.call.query[0, :, rows],
                    keys[: span.end].transpose(0, 1),
                    values[: span.end].transpose(0, 1),
                    span.start,
                    self.call,
                )
            )
        return torch.cat(found)

    def check(self, decoding: int) -> Step:
        """:param decoding: how many of the spans, the first ones, decode."""
        expected = self.expected()
        step = Step(self.cache, self.spans[:decoding], self.spans[decoding:])
        found = step.attend(self.call)
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)
        return step


KERNELS = [
    {"kernel": "sdpa"},
    {"kernel": "eager"},
    {"kernel": "sdpa", "window": 5},
    {"kernel": "eager", "window": 5},
    {"kernel": "sdpa", "window": 500},
    {"kernel": "sdpa", "softcap": 3.0},
    {"kernel": "eager", "softcap": 3.0, "window": 4},
    {"kernel": "sdpa", "sinks": True},
    {"kernel": "eager", "sinks": True, "window": 3, "softcap": 5.0},
    {"kernel": "sdpa", "groups": 4},
    {"kernel": "sdpa", "groups": 1, "window": 6},
    {"kernel": "eager", "groups": 1},
]


@pytest.mark.parametrize("how", KERNELS, ids=str)
@pytest.mark.parametrize(
    ("slots", "cached", "together", "beside"),
    [
        ([3], [20], False, True),
        ([1, 2, 3], [20, 14, 30], True, True),
        ([1, 2, 3], [9, 9, 9], True, True),
        ([1, 2, 3], [0, 1, 40], False, True),  # too different in length
        ([0, 2, 5], [20, 14, 30], True, False),  # not side by side
    ],
)
def test_requests_that_decode(
    how: dict[str, object],
    slots: list[int],
    cached: list[int],
    together: bool,
    beside: bool,
) -> None:
    scene = Scene(1, slots, cached, [1] * len(slots), **how)  # type: ignore[arg-type]
    step = scene.check(len(slots))
    assert (step._together, step._beside) == (together, beside)


@pytest.mark.parametrize("how", KERNELS, ids=str)
@pytest.mark.parametrize("slots", [[0, 2, 5], [1, 2, 3]], ids=["gathered", "beside"])
def test_requests_that_decode_together_however_their_keys_are_read(
    how: dict[str, object], slots: list[int]
) -> None:
    """On GPUs keys that do not lie side by side are gathered; here that is asked for."""
    scene = Scene(2, slots, [20, 14, 30], [1, 1, 1], **how)  # type: ignore[arg-type]
    expected = scene.expected()
    step = Step(scene.cache, scene.spans, [])
    step.attend(scene.call)  # keeps the keys
    query = scene.call.query[0].transpose(0, 1)
    query = query.reshape(3, scene.call.key.shape[1], -1, WIDTH)
    found = step._decode_together(scene.call, query).reshape(3, -1, VALUE)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("how", KERNELS, ids=str)
@pytest.mark.parametrize(
    ("cached", "counts"),
    [([0], [1]), ([0], [12]), ([7], [9]), ([0, 5, 30], [4, 1, 18])],
)
def test_chunks_of_prompts(how: dict[str, object], cached: list[int], counts: list[int]) -> None:
    scene = Scene(3, range(len(cached)), cached, counts, **how)  # type: ignore[arg-type]
    scene.check(0)


@settings(max_examples=150, deadline=None)
@example(seed=0, slots=[0, 1], cached=[0, 0, 0, 0, 0, 0], counts=[], window=1, how=KERNELS[0])
@given(
    seed=st.integers(0, 1000),
    slots=st.permutations(range(6)).flatmap(lambda p: st.integers(1, 6).map(lambda n: list(p[:n]))),
    cached=st.lists(st.integers(0, 35), min_size=6, max_size=6),
    counts=st.lists(st.integers(1, 12), max_size=4),
    window=st.none() | st.integers(1, 50),
    how=st.sampled_from(KERNELS),
)
def test_any_step(
    seed: int,
    slots: list[int],
    cached: list[int],
    counts: list[int],
    window: int | None,
    how: dict[str, object],
) -> None:
    """Some decode, some read prompts; ``counts`` are those of the last ones."""
    decoding = max(0, len(slots) - len(counts))
    sizes = [1] * decoding + counts[: len(slots) - decoding]
    scene = Scene(
        seed,
        slots,
        cached[: len(slots)],
        sizes,
        **(how | {"window": window}),  # type: ignore[arg-type]
    )
    scene.check(decoding)


@pytest.mark.parametrize("how", KERNELS, ids=str)
def test_a_single_text_from_its_beginning(how: dict[str, object]) -> None:
    scene = Scene(4, [0], [0], [20], **how)  # type: ignore[arg-type]
    recorder = Recorder()
    found = recorder.attend(scene.call)
    torch.testing.assert_close(found.double(), scene.expected(), atol=2e-5, rtol=2e-5)
    assert recorder.calls[7] is scene.call


def test_several_layers_share_what_is_the_same_and_nothing_else() -> None:
    scene = Scene(5, [1, 2, 4], [20, 14, 3], [1, 1, 9])
    scene.cache._keys[8] = scene.cache._keys[7].clone()
    scene.cache._values[8] = scene.cache._values[7].clone()
    step = Step(scene.cache, scene.spans[:2], scene.spans[2:])
    plain = scene.expected()
    scene.call = dataclasses.replace(scene.call, window=4)
    narrow = scene.expected()
    for layer, window, expected in ((7, None, plain), (8, 4, narrow), (7, None, plain)):
        call = dataclasses.replace(scene.call, layer=layer, window=window)
        torch.testing.assert_close(step.attend(call).double(), expected, atol=2e-5, rtol=2e-5)
    assert not torch.equal(plain, narrow)


def test_positions_are_those_of_each_token_in_its_request() -> None:
    scene = Scene(6, [1, 2, 4], [20, 14, 3], [1, 1, 3])
    assert Step(scene.cache, scene.spans[:2], scene.spans[2:]).positions() == [20, 14, 3, 4, 5]


# ── inside of Transformers ───────────────────────────────────────────────────────────────────


class Module:
    is_causal = True
    layer_idx = 0
    num_key_value_groups = 2
    training = False


def registered(name: str) -> object:
    from transformers import AttentionInterface

    attention.register()
    return AttentionInterface()[name]


@pytest.mark.parametrize("name", list(attention.NAMES.values()))
def test_what_is_not_known_is_refused(name: str) -> None:
    function = registered(name)
    call = Scene(7, [0], [0], [5]).call
    with attention.driving(Recorder()):
        for module, more in (
            (Module(), {"position_bias": 1}),
            (type("M", (Module,), {"is_causal": False})(), {}),
        ):
            with pytest.raises(attention.UnsupportedAttentionError):
                function(module, call.query, call.key, call.value, None, **more)  # type: ignore[operator]


@pytest.mark.parametrize("name", list(attention.NAMES.values()))
def test_outside_of_a_step_it_computes_what_transformers_does_with_caps_and_sinks(
    name: str,
) -> None:
    function = registered(name)
    for how in ({}, {"softcap": 3.0}, {"sinks": True}):
        scene = Scene(8, [0], [0], [9], **how)  # type: ignore[arg-type]
        call = scene.call
        found, _ = function(  # type: ignore[operator]
            Module(),
            call.query,
            call.key,
            call.value,
            None,
            scaling=call.scaling,
            softcap=call.softcap,
            s_aux=call.sinks,
        )
        torch.testing.assert_close(found[0].double(), scene.expected(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", list(attention.NAMES.values()))
def test_it_gives_up_when_it_is_told(name: str) -> None:
    function = registered(name)
    call = Scene(9, [0], [0], [5]).call
    asked = []

    def stopped() -> bool:
        asked.append(True)
        return len(asked) == 3

    with attention.stopping(stopped):
        for _ in range(2):
            function(Module(), call.query, call.key, call.value, None)  # type: ignore[operator]
        with pytest.raises(attention.StepStoppedError):
            function(Module(), call.query, call.key, call.value, None)  # type: ignore[operator]
    function(Module(), call.query, call.key, call.value, None)  # type: ignore[operator]
    assert len(asked) == 3
