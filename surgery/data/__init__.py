"""Text as tokens: the built-in text, files, data sets, text that a model writes, needles, passkeys, questions.

It may import architecture and the packages below it. It contains no method and no score.
"""
