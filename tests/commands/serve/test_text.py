"""The text of a response while its tokens come: what is handed out never has to be taken back."""

import numpy as np
import pytest

from prism_jax.commands.serve import text
from prism_jax.data import processor
from tests import tiny_checkpoint


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return processor.Processor.from_folder(
        tiny_checkpoint.write(tmp_path_factory.mktemp("text") / "policy")
    )


@pytest.fixture(scope="module")
def vocabulary(words):
    return text.Vocabulary.of(words)


def _write(vocabulary, tokens, stops, rng, *, with_tokens=True):
    """Return the pieces of a response whose tokens come in parts of random sizes."""
    writer, pieces, at = text.Writer(vocabulary, stops, with_tokens=with_tokens), [], 0
    while at < len(tokens):
        size = int(rng.integers(1, 4))
        part = tokens[at : at + size].tolist()
        pieces.append(writer.add(part, [-float(n) for n in range(len(part))]))
        at += size
    return writer, [*pieces, writer.end(by_token=False)]


def test_the_pieces_make_the_text_that_the_processor_decodes(words, vocabulary):
    rng = np.random.default_rng(0)
    # Half of the tokens are single bytes, so that characters are cut; some ids have no token.
    for number in range(300):
        tokens = rng.integers(0, len(vocabulary.names) + 5 if number % 2 else 256, 30)
        writer, pieces = _write(vocabulary, tokens, (), rng)
        assert "".join(piece.text for piece in pieces) == words.decode(tokens), tokens
        assert [d.token for piece in pieces for d in piece.drawn] == tokens.tolist()
        assert (writer.num_tokens, writer.is_stopped) == (30, False)
        writer, bare = _write(vocabulary, tokens, (), rng, with_tokens=False)
        assert "".join(piece.text for piece in bare) == words.decode(tokens), tokens
        assert (writer.num_tokens, sum(len(piece.drawn) for piece in bare)) == (30, 0)


def test_a_stop_text_cuts_the_text_where_it_first_begins(words, vocabulary):
    rng, num_stopped = np.random.default_rng(1), 0
    for _ in range(300):
        tokens = rng.integers(0, 256, 40)
        whole = words.decode(tokens)
        stops = [
            whole[a : a + int(rng.integers(1, 5))] for a in rng.integers(0, len(whole), 3).tolist()
        ]
        stops += ["never in it"]
        writer, pieces = _write(vocabulary, tokens, stops, rng)
        # The first to be complete wins, as for someone who reads token by token.
        ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
        given = "".join(piece.text for piece in pieces)
        assert writer.is_stopped and whole.startswith(given)
        assert not any(stop in given for stop in stops)
        assert len(given) <= min(ends) - 1
        assert any(whole.startswith(stop, len(given)) for stop in stops)
        assert [d.token for p in pieces for d in p.drawn] == tokens[
            : sum(len(p.drawn) for p in pieces)
        ].tolist()
        assert all(d.start < len(given) for p in pieces for d in p.drawn)
        num_stopped += writer.num_tokens < 40
        _, bare = _write(vocabulary, tokens, stops, rng, with_tokens=False)
        assert "".join(piece.text for piece in bare) == given
    assert num_stopped > 200


def test_the_end_token_writes_nothing_and_is_counted(words, vocabulary):
    writer = text.Writer(vocabulary, ("zz",), with_tokens=True)
    tokens = [*words.token_ids("a z"), words.ids.ends[0]]
    first = writer.add(tokens, [-1.0] * len(tokens))
    last = writer.end(by_token=True)
    assert first.text + last.text == "a z"
    assert first.text == "a "  # the z could begin the stop text
    assert [d.token for d in (*first.drawn, *last.drawn)] == tokens[:-1]
    assert writer.num_tokens == len(tokens)
