"""Text, as tokens: the built-in text, files, data sets, text that a model writes, needles, passkeys, questions.

May import architecture and the rooms below; knows no method and no score.
"""
