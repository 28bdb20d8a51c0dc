from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

from pbe_fast.engine.tracing import trace
from pbe_fast.models import PreActResNet18, SmallCNN


class Calls(nn.Module):
    """A linear layer, and a forward that is given."""

    def __init__(self, body: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.offset = torch.ones(4)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def nodes(graph: fx.Graph | None) -> list[tuple[str, str]]:
    assert graph is not None
    return [(node.op, str(node.target)) for node in graph.nodes][1:-1]


def test_calls_of_other_threads_go_on_as_ever() -> None:
    unrelated, images = SmallCNN(3, width=2).eval(), torch.rand(1, 1, 8, 8)
    followed, over = PreActResNet18(4, width=4), threading.Event()
    failures: list[object] = []
    answered = 0

    def serve() -> None:
        nonlocal answered
        while not over.is_set():
            try:
                with torch.no_grad():
                    assert type(unrelated(images)) is Tensor
                answered += 1
            except Exception as error:
                failures.append(error)

    server = threading.Thread(target=serve)
    server.start()
    for _ in range(20):
        assert trace(followed) is not None
    over.set()
    server.join()
    assert answered > 0
    assert not failures


def test_nothing_of_torch_modules_is_replaced_meanwhile() -> None:
    before, seen = (nn.Module.__call__, nn.Module.__getattr__), []
    trace(Calls(lambda self, x: seen.append((nn.Module.__call__, nn.Module.__getattr__)) or self.layer(x)))
    assert seen == [before]
    assert not fx._symbolic_trace.is_fx_symbolic_tracing()


def test_several_threads_may_follow_models_at_once() -> None:
    graphs: list[list[tuple[str, str]]] = []

    def follow() -> None:
        for _ in range(5):
            graphs.append(nodes(trace(Calls(lambda self, x: self.layer(x) * math.sqrt(x.size(1))))))

    threads = [threading.Thread(target=follow) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(graphs) == 15
    assert all(graph == graphs[0] for graph in graphs)
    assert "sqrt" in math.sqrt.__name__ and not hasattr(math.sqrt, "__wrapped__")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (lambda self, x: self.layer(x), [("call_module", "layer")]),
        (lambda self, x: x * self.scale, [("get_attr", "scale"), ("call_function", "<built-in function mul>")]),
        (lambda self, x: x * self.offset, [("get_attr", "offset"), ("call_function", "<built-in function mul>")]),
        (
            lambda self, x: x * self.layer.bias,
            [("get_attr", "layer.bias"), ("call_function", "<built-in function mul>")],
        ),
    ],
)
def test_what_is_called_and_read_is_a_node(body: Callable[..., Any], expected: list[tuple[str, str]]) -> None:
    assert nodes(trace(Calls(body))) == expected


@pytest.mark.parametrize(
    "body",
    [
        lambda self, x: self.layer(x) if x.sum() > 0 else x,
        lambda self, x: self.layer(x) if len(x) > 1 else x,
        lambda self, x: nn.Linear(4, 4)(x),
    ],
)
def test_what_cannot_be_followed(body: Callable[..., Any]) -> None:
    model = Calls(body)
    assert trace(model) is None
    assert (type(model), type(model.layer)) == (Calls, nn.Linear)


def test_further_arguments_keep_their_defaults() -> None:
    class Optional(Calls):
        def forward(self, x: Tensor, twice: bool = False) -> Any:
            return self.layer(self.layer(x)) if twice else self.layer(x)

    assert [op for op, _ in nodes(trace(Optional(lambda self, x: x)))].count("call_module") == 1


def test_what_is_compiled_is_not_followed() -> None:
    inside = Calls(lambda self, x: x)
    inside.layer.compile(backend="eager")
    for model in (torch.compile(Calls(lambda self, x: x), backend="eager"), inside):
        assert trace(model) is None


class Registered(nn.Module):
    """A class whose derived classes are written down, as some libraries do it."""

    known: ClassVar[list[type]] = []

    def __init_subclass__(cls) -> None:
        cls.known.append(cls)

    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


def test_the_classes_are_as_before() -> None:
    model = nn.Sequential(Registered(), nn.ReLU())
    graph = trace(model)
    assert nodes(graph) == [("call_method", "relu"), ("call_module", "1")]
    assert [type(module) for module in model.modules()] == [nn.Sequential, Registered, nn.ReLU]
    assert Registered.known == []
    assert graph is not None and not any(node.meta for node in graph.nodes)
