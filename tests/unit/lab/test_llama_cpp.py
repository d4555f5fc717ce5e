"""What the comparison with llama.cpp tells of its records."""

from benchmarks.lab.llama_cpp import plain_of, summary


def row(method: str, question: int, ids: list[int], decode_seconds: float) -> dict[str, object]:
    return {
        "method": method,
        "round": 0,
        "question": question,
        "ids": ids,
        "decode_seconds": decode_seconds,
        "seconds": 2 * decode_seconds,
    }


def test_the_first_token_is_no_decoding_and_answers_are_compared_question_by_question() -> None:
    a, b = "ours int8/none", "ours int8/lookup"
    rows = [row(a, 0, [1, 2, 3], 1.0), row(b, 0, [1, 2, 3], 0.5), row(a, 1, [4], 0.0), row(b, 1, [5], 0.0)]
    first, second = summary(rows, [a, b])
    assert (first["decode_tokens_per_second"], second["decode_tokens_per_second"]) == (2.0, 4.0)
    assert (first["tokens_per_second"], second["tokens_per_second"]) == (2.0, 4.0)
    assert (first["answers_as_first"], second["answers_as_first"]) == ("2 of 2", "1 of 2")
    assert second["answers_as_plain"] == "1 of 2"


def test_drafts_are_held_against_plain_decoding_of_their_own_weights() -> None:
    assert plain_of("ours gguf/amphista+lookup") == "ours gguf/none"
    assert plain_of("llama.cpp GGUF/ngram-mod") == "llama.cpp GGUF" == plain_of("llama.cpp GGUF")
