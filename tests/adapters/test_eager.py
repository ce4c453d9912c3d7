import pytest
import torch

from monteclora.adapters.eager import uncompiled


@pytest.fixture
def compiled():
    """A function, and how often it was compiled."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    yield torch.compile(lambda x: x.sin() + 1, backend=backend), graphs
    torch._dynamo.reset()


def test_nothing_is_compiled_inside(compiled):
    call, graphs = compiled
    with uncompiled():
        call(torch.ones(2))
        with uncompiled():
            call(torch.ones(2))
        call(torch.ones(2))
    assert not graphs
    call(torch.ones(2))
    assert len(graphs) == 1


def test_blocks_that_overlap_leave_the_compiler_as_it_was(compiled):
    """As two threads' do: the one that began first ends first."""
    call, graphs = compiled
    first, second = uncompiled(), uncompiled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    call(torch.ones(2))
    assert not graphs, "the second block has not ended"
    second.__exit__(None, None, None)
    call(torch.ones(2))
    assert len(graphs) == 1


def test_an_error_inside_ends_it(compiled):
    call, graphs = compiled
    with pytest.raises(ZeroDivisionError), uncompiled():
        raise ZeroDivisionError
    call(torch.ones(2))
    assert len(graphs) == 1


def test_a_stance_of_the_users_own_stays(compiled):
    call, graphs = compiled
    with torch.compiler.set_stance("force_eager"):
        with uncompiled():
            pass
        call(torch.ones(2))
    assert not graphs
    call(torch.ones(2))
    assert len(graphs) == 1
