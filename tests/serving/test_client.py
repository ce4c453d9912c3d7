"""The client against servers whose every distribution is known."""

from __future__ import annotations

import socket

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from monteclora.errors import ConfigError, ServerError
from monteclora.prediction import uncertainty
from monteclora.prediction.agreement import agreement
from monteclora.serving import Client
from tests.serving.fake import ADAPTERS, VOCABULARY, fake_server, log_probs

PROMPT, TEXT = [0, 3, 5], [7, 1, 11, 4]
NAMES = ("total", "aleatoric", "epistemic")
DRAWS = range(1, len(ADAPTERS))


@pytest.fixture(params=["vllm", "llamacpp"])
def server(request):
    with fake_server(request.param) as found:
        yield found


def known(prompt, text):
    """Every adapter's log-probabilities along a text, (S, T, V)."""
    return np.array([[log_probs(s, [*prompt, *text[:t]]) for t in range(len(text))] for s in DRAWS])


def test_with_the_whole_vocabulary_the_numbers_are_those_of_the_model(server):
    with Client(f"{server[0]}/v1", top=VOCABULARY) as client:
        assert client.adapters == ADAPTERS[1:]
        found = client.score(PROMPT, TEXT)
    expected = known(PROMPT, TEXT)
    at = expected[:, np.arange(len(TEXT)), TEXT]
    np.testing.assert_allclose(found.scores.draw_log_probs, at, atol=1e-12)
    np.testing.assert_allclose(found.scores.log_probs, logsumexp(at, axis=0) - np.log(len(at)), atol=1e-12)
    probs = torch.from_numpy(np.exp(expected))
    for name in NAMES:
        values = getattr(uncertainty, name)(probs).numpy()
        np.testing.assert_allclose(getattr(found.scores, name), values, atol=1e-6, err_msg=name)
    assert found.scores.epistemic.min() > 0.01
    np.testing.assert_allclose(found.covered, 1.0)
    assert found.texts == [f" {token}" for token in TEXT]
    assert found.scores.sequence().log_probability == pytest.approx(found.scores.log_probs.sum())


@pytest.mark.parametrize("top", [1, 3, 8])
def test_from_the_likeliest_tokens_alone_uncertainties_are_lower_bounds(server, top):
    with Client(server[0], top=top) as client:
        found = client.score(PROMPT, TEXT)
    expected = known(PROMPT, TEXT)
    np.testing.assert_allclose(found.scores.draw_log_probs, expected[:, np.arange(len(TEXT)), TEXT], atol=1e-12)
    np.testing.assert_allclose(found.scores.total, found.scores.aleatoric + found.scores.epistemic, atol=1e-12)
    probs = torch.from_numpy(np.exp(expected))
    for name in NAMES:
        whole = getattr(uncertainty, name)(probs).numpy()
        assert (getattr(found.scores, name) <= whole + 1e-12).all(), name
    assert (found.covered < 1).all()
    assert (found.scores.epistemic >= 0).all()


def test_options_are_exact_whatever_the_number_of_tokens(server):
    options = [[7, 1], [7, 2], [9]]
    with Client(server[0], top=1) as client:
        found = client.options(PROMPT, options)
        texts = client.options("3 5", ["7 1", "7 2", "9"])
    likelihoods = np.array(
        [[sum(log_probs(s, [*PROMPT, *o[:t]])[o[t]] for t in range(len(o))) for o in options] for s in DRAWS]
    )
    probs = np.exp(likelihoods - logsumexp(likelihoods, axis=1, keepdims=True))
    np.testing.assert_allclose(found.probs[0], probs.mean(0), atol=1e-12)
    expected = torch.from_numpy(probs[:, None, :])
    for name in NAMES:
        np.testing.assert_allclose(getattr(found, name), getattr(uncertainty, name)(expected), atol=1e-12)
        # texts are made tokens of by the server; only a prompt gets what stands before a text
        np.testing.assert_allclose(getattr(texts, name), getattr(found, name), atol=1e-12)


def test_what_one_adapter_writes_and_what_each_does(server):
    with Client(server[0], top=VOCABULARY) as client:
        written = client.complete(PROMPT, 3, adapter="mean")
        texts, agreed = client.answers(PROMPT, 2)
    ids = written.scores.tokens.tolist()
    assert ids == [int(log_probs(0, [*PROMPT, *ids[:t]]).argmax()) for t in range(3)]
    np.testing.assert_allclose(written.scores.draw_log_probs, known(PROMPT, ids)[:, np.arange(3), ids], atol=1e-12)
    first = [int(log_probs(s, PROMPT).argmax()) for s in DRAWS]
    assert [int(text.split()[0]) for text in texts] == first
    assert agreed == agreement(texts)


def test_an_adapter_that_is_not_there_is_no_base_model(server):
    with Client(server[0]) as client, pytest.raises((ConfigError, ServerError), match="typo"):
        client.complete(PROMPT, 3, adapter="typo")


def test_a_busy_server_is_asked_again(server):
    address, fake = server
    with Client(address, retries=2, api_key="secret") as client:
        fake.failures = 2
        assert client.score(PROMPT, TEXT[:1]).scores.tokens.tolist() == TEXT[:1]
    assert fake.failures == 0
    assert all(headers["Authorization"] == "Bearer secret" for _, _, headers in fake.asked)
    with Client(address, retries=0) as client:
        fake.failures = 1
        with pytest.raises(ServerError, match="answered 503: busy"):
            client.score(PROMPT, TEXT[:1])


def test_a_slow_absent_or_strange_server_ends_in_one_line(server):
    address, fake = server
    with Client(address, retries=0, timeout=0.3) as client:
        fake.delay = 1.0
        with pytest.raises(ServerError, match=r"did not answer within 0\.3 s"):
            client.score(PROMPT, TEXT[:1])
        fake.delay = 0.0
        fake.garbage = True
        with pytest.raises(ServerError, match="in a form that is not known"):
            client.score(PROMPT, TEXT[:1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ServerError, match="cannot be reached"):
        Client(f"http://127.0.0.1:{port}", retries=0)


def test_arguments_are_checked(server):
    address, fake = server
    for options, message in (
        ({"adapters": ["sample-9"]}, "no adapter 'sample-9'; it has mean, sample-0"),
        ({"kind": "other"}, "expected one of vllm, llamacpp"),
        ({"top": 0}, "top is 0"),
        ({"timeout": 0}, "timeout is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Client(address, **options)
    with pytest.raises(ConfigError, match="expected a URL"):
        Client("localhost:8000")
    fake.kind = "sglang"
    with pytest.raises(ConfigError, match="'sglang', which is not known"):
        Client(address)
    fake.kind = "vllm"
    with Client(address, ["sample-0"], kind="vllm") as client:
        with pytest.raises(ConfigError, match="has no token"):
            client.score(PROMPT, [])
        with pytest.raises(ConfigError, match="two options or more"):
            client.options(PROMPT, [[1]])
        with pytest.raises(ServerError, match="answered 400: no model refused"):
            client.complete(PROMPT, 1, adapter="refused")
