"""The beginnings of English texts of many kinds, from which a model writes running text (`generated.py`)."""

from __future__ import annotations

from itertools import chain

KINDS = {
    "stories": (
        "My uncle was mending the boat when he first spoke of",
        "The old woman set down her basket at the gate and",
        "The train had been standing in the snow for an hour",
        "There was once a miller who had three daughters, and the",
        "The captain folded the map, put out the lamp, and went",
        "She read the message twice, burned it over the candle, and",
        "Nobody knew where the boy had come from, or why he",
        "He had never cared for the sea, and yet every summer",
    ),
    "letters, diaries and speeches": (
        "Dear Sir, with reference to your order of the third of",
        "Monday. Slept badly, and rose before it was light. The weather",
        "Ladies and gentlemen, we have come here tonight to say goodbye",
        "Hi Anna, thanks for your mail! Sorry that it took me",
        "Dear grandmother, the parcel came yesterday, and we were all so",
        "Fourth day of the march. We crossed the river at noon",
        "To whom it may concern: Mr. Keller worked in our firm",
        "Comrades, we are told that there is no money for schools",
    ),
    "news and reviews": (
        "The government said on Tuesday that it would not raise the",
        "Police are looking for two men who were seen leaving a",
        "The home side came from behind in the second half to",
        "Shares fell sharply in early trading after the company announced that",
        "The film begins with a long shot of an empty road",
        "At least twelve people were hurt when a ferry ran into",
        "Scientists at the university have found a new way to make",
        "The band's third record is slower than the first two, and",
    ),
    "history, lives and essays": (
        "He was born in a small village in the north, the",
        "The war had lasted for eleven years, and both kingdoms were",
        "Few questions in philosophy have been argued over for as long",
        "The city lies on both banks of the river, and was",
        "People have always told each other stories about the stars, and",
        "After her father's death the young queen sent envoys to every",
        "Why do we laugh? Some say that laughter is a kind",
        "In those years the valley was poor, and many of its",
    ),
    "science, handbooks and law": (
        "In this paper we show that the rate at which a",
        "The leaves of this plant are broad and dark, and in",
        "A function is called continuous if a small change of its",
        "Cells of the immune system recognise a virus by the proteins",
        "First wash the vegetables and cut them into thin slices. Heat",
        "Before you begin, make sure that the power is off and",
        "The patient, a man of forty, was admitted with a pain",
        "The tenant shall not let the property to others without the",
    ),
    "dialogue, verse and the web": (
        "ANNE. Then you have told him nothing? HENRY. Not a word.",
        "Q: Why do birds fly south in winter? A: Most of",
        "O gentle wind that wanders through the evening trees, and bears",
        "I bought this phone two weeks ago and so far it",
        "Does anyone know how to get rid of ants in the",
        '"Where were you last night?" asked the inspector. "At home," said',
        "The snow lies deep, the lamp burns low, the clock has",
        "Top ten places to visit this summer: number one is a",
    ),
}
OPENINGS = tuple(chain.from_iterable(zip(*KINDS.values(), strict=True)))  # in turn, so that a few are of all kinds
