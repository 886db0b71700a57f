"""What tests of the search share: it is given Markov chains, whose tokens 0 and 1 are the start and the end."""

START, END = 0, 1


def outputs(found, sentence: int = 0) -> list[tuple[tuple[int, ...], float, bool]]:
    """The hypotheses of a sentence, best first: tokens, score and whether it has ended."""
    result = []
    for beam in range(found.lengths.shape[1]):
        length = int(found.lengths[sentence, beam])
        if length:
            tokens = tuple(int(t) for t in found.tokens[sentence, beam, :length])
            result.append((tokens, float(found.scores[sentence, beam]), bool(found.finished[sentence, beam])))
    return result
