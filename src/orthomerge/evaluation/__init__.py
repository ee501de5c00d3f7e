"""Scores: of classifiers and regressions, of answers in words, by lm-evaluation-harness."""
