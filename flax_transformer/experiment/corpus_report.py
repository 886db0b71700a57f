"""What a survey of a corpus found, in words: a small table, and advice about lines that look wrong."""

import math

from flax_transformer.data.held_out import SplitSizes
from flax_transformer.data.text_survey import UNEQUAL_RATIO, VERY_LONG, SideSurvey, TextSurvey
from flax_transformer.errors import InputError

# Below this correlation of lengths the two sides hardly translate each other.
LEAST_CORRELATION = 0.4

# Number of pairs from which on a correlation says something.
LEAST_PAIRS = 100

# Share of copied pairs from which on both sides are taken for the same text.
SAME_TEXT = 0.9


def check_survey(survey: TextSurvey, name: str) -> None:
    """Raises an `InputError` if nothing can be learnt from a text."""
    if survey.num_pairs == survey.num_empty:
        raise InputError(f"{name}: each of its {survey.num_pairs:,} pairs has an empty side. Give text on both sides.")
    if survey.num_copied > SAME_TEXT * (survey.num_pairs - survey.num_empty):
        raise InputError(
            f"{name}: {survey.num_copied:,} of {survey.num_pairs:,} pairs have the same text on both sides, so these "
            "are not translations. Name a file of each language, or other columns."
        )


def survey_text(survey: TextSurvey) -> str:
    """Returns a table of both sides, and a line of what was found in pairs."""
    rows = [("", "source", "target")]
    for name, value in (
        ("characters", lambda side: f"{side.characters:,}"),
        ("different characters", lambda side: f"{len(side.counts):,}"),
        ("characters a line", lambda side: f"{side.characters / survey.num_pairs:.1f}"),
        ("words a line", lambda side: _words(side, survey.num_pairs)),
        ("longest line", lambda side: f"{side.longest:,} (line {side.longest_line:,})"),
        ("empty lines", lambda side: f"{side.empty:,}"),
    ):
        rows.append((name, value(survey.source), value(survey.target)))
    table = "\n".join(f"  {name:22}{source:>22}{target:>22}".rstrip() for name, source, target in rows)
    about = "" if survey.pairs.exact else "about "
    found = [
        f"{about}{survey.num_duplicates:,} repeat an earlier pair",
        f"{survey.num_copied:,} have the same text on both sides",
        f"{survey.num_unequal:,} have one side more than {UNEQUAL_RATIO:.0f} times as long",
        f"{survey.num_very_long:,} have more than {VERY_LONG:,} characters",
    ]
    ratio = survey.target.characters / max(survey.source.characters, 1)
    correlation = survey.length_correlation
    correlate = "" if math.isnan(correlation) else f"; the lengths of both sides correlate by {correlation:.2f}"
    return (
        f"{survey.num_pairs:,} pairs of lines\n{table}\n  of the pairs, {', '.join(found)}\n"
        f"  the target has {ratio:.2f} times the characters of the source{correlate}"
    )


def _words(side: SideSurvey, num_pairs: int) -> str:
    return f"{side.words / num_pairs:.1f}" if side.writes_spaces else "no spaces"


def survey_warnings(survey: TextSurvey) -> list[str]:
    """Returns advice about what looks wrong in a text."""
    warnings = []
    correlation = survey.length_correlation
    if survey.num_pairs >= LEAST_PAIRS and not math.isnan(correlation) and correlation < LEAST_CORRELATION:
        warnings.append(
            f"the lengths of both sides correlate by {correlation:.2f} alone, and those of translations mostly do by "
            "more than 0.7. Look whether line n of one file still translates line n of the other."
        )
    if survey.num_unequal > 0.01 * survey.num_pairs:
        warnings.append(
            f"{survey.num_unequal:,} pairs ({survey.num_unequal / survey.num_pairs:.1%}) differ much in length, the "
            f"first on line {survey.first_unequal:,}. Look at some: are the files aligned?"
        )
    if survey.num_empty > 0.01 * survey.num_pairs:
        warnings.append(f"{survey.num_empty:,} pairs have an empty side. They are left out.")
    return warnings


def split_text(sizes: SplitSizes, folder: str) -> str:
    """Returns a line about the parts of a corpus."""
    taken = [f"{getattr(sizes, part):,} {part}" for part in ("validation", "test") if getattr(sizes, part)]
    left = f"; {sizes.left_out:,} other pairs with one of these sources are in no part" if sizes.left_out else ""
    return f"{folder}: {sizes.train:,} training, {' and '.join(taken)} pairs{left}"
